"""What one rank executes: ``python -m jobs.runner RUN_DIR``. Reads RUN_DIR/config.yaml and calls ``nepa_dist.train.main``.

Started by the launcher of this machine, by torchrun (``torchrun --nproc-per-node 8 -m jobs.runner RUN_DIR``) or by srun.

The exit code is that of the training (0 finished, 75 stopped after saving; in our jobs 0 for both), 2 for a mistake in the
configuration or the data, 1 for everything else. RUN_DIR/job/outcome.json says which it was. Nothing slow is imported before
the process is tied to its launcher.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import NoReturn

from jobs.cluster import LAUNCHER_PID, USER_ERROR, environment_from_srun
from jobs.payload import check_code, read_secrets, refuse_foreign
from jobs.runs import BATCH, KINDS, last_line, write_outcome
from nepa_dist.guard import EXIT_AGAIN, EXIT_DONE, EXIT_FAILED, STOP_SIGNALS, RunInUse

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_launcher() -> None:
    """Have the kernel kill this process when its launcher ends, however that ends; without a launcher, do nothing.

    Raises:
        OSError: the kernel refused.
    """
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher is None or sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != int(launcher):  # it ended before the call above
        os._exit(EXIT_FAILED)


def stop_outside_training(number: int, _: FrameType | None) -> NoReturn:
    """Handler of the stop signals before the training installs its own: there is nothing to save, so end as a stopped run."""
    os.write(2, f"stopped by {signal.Signals(number).name} outside of the training loop, nothing is lost\n".encode())
    os._exit(EXIT_AGAIN)


def main(argv: list[str] | None = None) -> int:
    """Run the training of one rank.

    Args:
        argv: [RUN_DIR]; default: the command line.

    Returns:
        The exit code of the process. A failure that is not a user's mistake ends the process here instead, with code 1.
    """
    die_with_launcher()
    under_srun = environment_from_srun(os.environ)
    os.environ.update(under_srun)
    for number in STOP_SIGNALS:
        signal.signal(number, stop_outside_training)
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1:
        print("usage: python -m jobs.runner RUN_DIR", file=sys.stderr)
        return USER_ERROR
    run_dir = Path(arguments[0])
    try:
        from nepa_dist.config_load import load_config

        if under_srun:
            refuse_foreign(run_dir)
        # The folder may have been moved since its configuration was written.
        place = {"run_root": str(run_dir.absolute().parent), "name": run_dir.absolute().name}
        config = load_config([run_dir / "config.yaml"]).model_copy(update=place)
        if under_srun:
            check_code(config, int(os.environ["RANK"]))
            os.environ.update(read_secrets(config.cluster))
        from nepa_dist.train import main as train

        code = train(config)
        if os.environ.get("RANK", "0") == "0":
            why = re.sub("^[0-9-]+ [0-9:]+ ", "", last_line(run_dir / "log.txt")) if code == EXIT_FAILED else ""
            _note(run_dir, KINDS.get(code, "crashed"), why)
        # All ranks have stopped together. To srun that must look like a good end: it would kill those that are still closing.
        return EXIT_DONE if code == EXIT_AGAIN and BATCH in os.environ else code
    except Exception as error:
        if is_user_error(error):
            print(error, file=sys.stderr, flush=True)
            if not isinstance(error, RunInUse):  # how the run of the other trainer ends is not for this one to say
                _note(run_dir, "mistake", f"rank {os.environ.get('RANK', '0')}: {error}")
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                os._exit(USER_ERROR)  # the interpreter's exit may wait for a collective that the other ranks are in
            return USER_ERROR
        _fail(error, run_dir)


def is_user_error(error: BaseException) -> bool:
    """Whether the message of an error is written to be printed alone: the project's own subclasses of ValueError."""
    return isinstance(error, ValueError) and type(error).__module__.partition(".")[0] in ("nepa_dist", "jobs")


def _note(run_dir: Path, kind: str, detail: str = "") -> None:
    """Leave word of how it ended; a full disk must not turn a good end into a bad one."""
    try:
        write_outcome(run_dir, kind, detail)
    except OSError as error:
        print(f"{run_dir}: how this run ended could not be noted: {error}", file=sys.stderr, flush=True)


def _fail(error: Exception, run_dir: Path) -> NoReturn:
    """Write the traceback and one last line that names the rank, then end without waiting for threads or collectives."""
    rank = int(os.environ.get("RANK", "0"))
    details = "".join(traceback.format_exception(error)).rstrip()
    summary = f"rank {rank} failed: {traceback.format_exception_only(error)[-1].strip()}"
    if rank == 0 and "SLURM_PROCID" not in os.environ:  # the output of the others is in their log already
        log = run_dir / "logs" / "rank-0.txt"
        try:
            log.parent.mkdir(exist_ok=True)
            with log.open("a", encoding="utf-8") as file:
                file.write(f"{details}\n{summary}\n")
        except OSError as problem:
            details += f"\n(this could not be written to {log}: {problem.strerror})"
    _note(run_dir, "crashed", summary)
    sys.stdout.flush()
    print(f"{details}\n{summary}", file=sys.stderr, flush=True)
    os._exit(EXIT_FAILED)


if __name__ == "__main__":
    code = main()
    # While it ends, the interpreter gives signals their default back, and one of them would make a good run a failed one.
    for stop_signal in STOP_SIGNALS:
        signal.signal(stop_signal, signal.SIG_IGN)
    sys.exit(code)
