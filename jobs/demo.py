"""``make demo``: pretrain a small NEPA model, stop it, resume it, probe it, show the result. Minutes on a laptop's CPU.

Every step is a command that a user could type; each is printed before it runs. A run that is there already is continued, and
a finished one is only evaluated again.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # started as a file: the folder above holds both packages

from nepa_dist.guard import EXIT_AGAIN  # noqa: E402
from nepa_dist.metrics.sinks import read_curve  # noqa: E402

RUN = Path("runs/demo")
RECIPE = ["pretrain", "vit_tiny", "--cluster", "local", "--data", "digits", "--name", "demo", "--set", "model.depth=6"]
STOP_AT_STEP = 100


def main() -> int:
    """Run the demo in the project's folder; returns the exit code."""
    os.chdir(ROOT)
    started = time.monotonic()
    pretrain = [sys.executable, "jobs/submit.py", *RECIPE]
    code = _run(pretrain, "1. Pretrain on scenes of handwritten digits; stopped on the way, as a scheduler would.", stop=True)
    if code == EXIT_AGAIN:
        code = _run(pretrain, "2. The same command again continues at the step where it stopped.")
    if code != 0:
        return code
    title = "3. Probe the frozen features of every layer, against the same model untrained."
    code = _run([sys.executable, "-m", "nepa_dist.evaluate", str(RUN), "--num-train", "2000", "--num-test", "1000"], title)
    if code == 0:
        pictures = "\n".join(f"  {path}" for path in sorted((RUN / "figures").glob("*.png")))
        print(f"\nPictures:\n{pictures}\nRun folder: {RUN}    total {time.monotonic() - started:.0f} s")
    return code


def _run(command: list[str], title: str, *, stop: bool = False) -> int:
    shown = ["python", *command[1:]]
    print(f"\n{title}\n$ {shlex.join(shown)}", flush=True)
    stop = stop and _last_step() < STOP_AT_STEP
    process = subprocess.Popen(command)
    try:
        while process.poll() is None:
            if stop and _last_step() >= STOP_AT_STEP:
                print(f"--- step {STOP_AT_STEP} reached: sending SIGTERM", flush=True)
                process.send_signal(signal.SIGTERM)
                stop = False
            time.sleep(0.2)
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
    return process.returncode


def _last_step() -> int:
    file = RUN / "metrics.jsonl"
    rows = read_curve(file) if file.exists() else []
    return int(rows[-1]["step"]) if rows else 0


if __name__ == "__main__":
    sys.exit(main())
