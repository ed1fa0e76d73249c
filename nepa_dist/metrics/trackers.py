"""Experiment trackers that a run reports to if it is told to: TensorBoard and Weights & Biases. Imports no torch.

What they get has the registry's keys, with a slash for the dot (``embedding_mean_cosine/target``), by which they group. Their
libraries are loaded only for runs that name them (``metrics.sinks``).

A tracker may be slow, hang, or be gone, so each works in a thread of its own (:class:`Background`): the loop only puts rows
into a queue, and hears of failures at its next one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nepa_dist.config import Config
from nepa_dist.metrics.sinks import Sink

LIBRARIES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
"""Tracker -> what it needs; the extra of this project has the tracker's name."""
MAX_WAITING_ROWS = 1000
CLOSE_SECONDS = 30.0
"""How long the end of a run waits for rows on their way."""


def tracker_problems(names: Sequence[str]) -> list[str]:
    """Sentences about trackers that cannot be used because their library is missing.

    Args:
        names: of ``LIBRARIES``.
    """
    return [
        f"metrics.sinks: {name} needs {LIBRARIES[name]}, which is not installed: pip install 'nepa-dist[{name}]'"
        for name in dict.fromkeys(names)
        if importlib.util.find_spec(LIBRARIES[name]) is None
    ]


def open_trackers(config: Config, resume_step: int, logged_step: int) -> list[Sink]:
    """The trackers of a run; each opens in its own time.

    Args:
        config: ``metrics.sinks``; of the rest, what wandb shows beside the curves.
        resume_step: the step of the checkpoint that the run continues from, 0 for a new run.
        logged_step: the last step that an earlier start has logged.
    """
    settings = config.model_dump(mode="json", exclude={"cluster", "metrics", "run_root"})
    ways: dict[str, Callable[[], Sink]] = {
        "tensorboard": lambda: TensorBoardSink(config.run_dir / "tensorboard", resume_step),
        "wandb": lambda: WandbSink(config.run_dir, config.metrics.wandb_project, config.name, settings, logged_step),
    }
    return [Background(name, ways[name]) for name in dict.fromkeys(config.metrics.sinks)]


class Background:
    """A sink whose calls are made by a thread of its own, so that nobody waits for it.

    What the sink raises, also while it is opened, is raised here by a later call.

    Args:
        name: of the sink.
        open_sink: makes it, in the thread.
    """

    def __init__(self, name: str, open_sink: Callable[[], Sink]) -> None:
        self.name = name
        self._open_sink = open_sink
        self._rows: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(MAX_WAITING_ROWS)
        self._errors: deque[Exception] = deque()
        self._sink: Sink | None = None
        self._broken: Exception | None = None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Leave a row for the thread.

        Raises:
            RuntimeError: too many rows wait; this one is dropped.
            Exception: an earlier row could not be written, or the sink could not be opened.
        """
        if self._broken is not None:
            raise self._broken
        try:
            self._rows.put_nowait((step, values))
        except queue.Full:
            raise RuntimeError(f"{MAX_WAITING_ROWS} rows wait for it, more are dropped") from None
        if self._errors:
            raise self._errors.popleft()

    def event(self, message: str) -> None:
        """Messages are not part of the curves."""

    def close(self) -> None:
        """Let the thread write what waits, for CLOSE_SECONDS at most.

        Raises:
            TimeoutError: it was not done by then; the rest is given up.
            Exception: a row could not be written.
        """
        with contextlib.suppress(queue.Full):
            self._rows.put_nowait(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            if isinstance(self._sink, WandbSink):
                self._sink.abandon()
            raise TimeoutError(f"not done {CLOSE_SECONDS:g} s after the end, with {self._rows.qsize()} rows waiting")
        if self._errors:
            raise self._errors.popleft()

    def _work(self) -> None:
        try:
            self._sink = sink = self._open_sink()
        except Exception as error:
            self._broken = error
            return
        while (row := self._rows.get()) is not None:
            try:
                sink.write(*row)
            except Exception as error:
                self._errors.append(error)
        try:
            sink.close()
        except Exception as error:
            self._errors.append(error)


class TensorBoardSink:
    """Event files in a folder; a resumed run adds one that takes back what the resume will do again.

    Args:
        folder: for ``tensorboard --logdir``; made if missing.
        resume_step: the step of the checkpoint that the run continues from, 0 for a new run.

    Raises:
        ImportError: tensorboardX is not installed.
        OSError: the folder cannot be used.
    """

    name = "tensorboard"

    def __init__(self, folder: Path, resume_step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

        self._summary, self._value, self._event = Summary, Summary.Value, Event
        self._writer: Any = None
        folder.mkdir(parents=True, exist_ok=True)

        def open_file() -> Any:
            # Readers take files in the order of their names; by itself the library would replace one of the same second.
            return EventsWriter(str(folder / "events"), f".{time.time_ns()}")

        self._open_file = open_file
        self._writer = open_file()
        # TensorBoard drops what earlier files say of this step and later ones.
        start = Event(wall_time=time.time(), step=resume_step + 1, session_log=SessionLog(status=SessionLog.START))
        self._put(start)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the scalars of one step; after a failure, into a new file, because readers stop where one is damaged.

        Raises:
            OSError: they could not be written.
        """
        if self._writer is None:
            self._writer = self._open_file()
        scalars = [self._value(tag=key.replace(".", "/"), simple_value=x) for key, x in values.items() if key != "step"]
        self._put(self._event(wall_time=time.time(), step=step, summary=self._summary(value=scalars)))

    def event(self, message: str) -> None:
        """Messages are not part of the curves."""

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()

    def _put(self, event: Any) -> None:
        try:
            self._writer.write_event(event)
            self._writer.flush()
        except OSError:
            with contextlib.suppress(OSError):  # it tries once more to write what did not fit
                self._writer.close()
            self._writer = None
            raise


class WandbSink:
    """A run of Weights & Biases; a resumed run goes on as the same one.

    The library lives in a process of its own (``wandb_process.py``): where its server cannot be reached, it would hold up the
    end of ours. Where wandb is offline (``WANDB_MODE=offline``), ``wandb sync`` uploads what is in the folder.

    Args:
        run_dir: folder of the run; wandb writes into its folder ``wandb``, and so does the id of the run there.
        project: at wandb.
        run: name of the run.
        config: settings to show beside the curves.
        logged_step: the last step that an earlier start has logged. wandb cannot take steps back, so those up to here are
            left as they are.
    """

    name = "wandb"

    def __init__(self, run_dir: Path, project: str, run: str, config: Mapping[str, Any], logged_step: int) -> None:
        known = run_dir / "wandb" / "run-id.txt"
        known.parent.mkdir(parents=True, exist_ok=True)
        if known.exists():
            run_id, self._logged_step = known.read_text(encoding="utf-8").strip(), logged_step
        else:
            run_id, self._logged_step = uuid.uuid4().hex[:12], 0
            known.write_text(run_id + "\n", encoding="utf-8")
        script = Path(__file__).with_name("wandb_process.py")
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(script)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
        )  # fmt: skip
        hello = {"project": project, "name": run, "id": run_id, "dir": str(run_dir), "config": dict(config)}
        self._hello: dict[str, Any] | None = hello  # said with the first step: the answer may take minutes

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Hand one step to wandb, and before the first one begin there.

        Raises:
            OSError: wandb cannot begin, for instance without an account; the step could not be taken; the process is gone.
        """
        if self._hello is not None:
            hello, self._hello = self._hello, None
            self._say(hello)
        if step > self._logged_step:
            self._say({"step": step, "values": {key.replace(".", "/"): x for key, x in values.items() if key != "step"}})

    def event(self, message: str) -> None:
        """Messages are not part of the curves."""

    def close(self) -> None:
        """Wait until wandb has uploaded, or written down, everything."""
        if self._hello is None:
            self._say({})
        else:  # nothing was logged
            self._process.kill()
        self._process.wait()

    def abandon(self) -> None:
        """End the process whatever it does; what it has not uploaded is in the folder."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _say(self, message: Mapping[str, Any]) -> None:
        """Send a line and wait for the answer: an empty line, or what went wrong."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer.endswith("\n"):
            raise OSError("its process has ended")
        if answer != "\n":
            raise OSError(answer.strip())
