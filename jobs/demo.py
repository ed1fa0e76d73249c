"""``make demo``: pretrain a small NEPA model, stop it, resume it, fine-tune and segment with and without it, show the result.

Every step is a command that a user could type; each is printed before it runs. What is there already is not done again.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # started as a file: the folder above holds both packages

from jobs.runs import read_scores  # noqa: E402
from nepa_dist.guard import EXIT_AGAIN  # noqa: E402
from nepa_dist.metrics.sinks import read_curve  # noqa: E402

RUNS = Path("runs/demo")
PIPELINE = ["jobs/submit.py", "pipeline", "demo", "--cluster", "local", "--name", "demo"]
PROBE = ["-m", "nepa_dist.evaluate", str(RUNS / "pretrain"), "--num-train", "2000", "--num-test", "1000", "--k", "20"]
REPORT = ["-m", "jobs.pipeline_report", str(RUNS)]
STOP_AT_STEP = 100


def main() -> int:
    """Run the demo in the project's folder; returns the exit code."""
    argparse.ArgumentParser(prog="make demo", description=str(__doc__)).parse_args()
    os.chdir(ROOT)
    started = time.monotonic()
    title = "1. Pretrain on scenes of handwritten digits; stopped on the way, as a scheduler would."
    code = _run(PIPELINE, title, stop=True)
    if code == EXIT_AGAIN:
        title = "2. The same command continues where it stopped, then fine-tunes and segments, with and without pretraining."
        code = _run(PIPELINE, title)
    code = code or _run(PROBE, "3. Probe the frozen features of every layer, against the same model untrained.")
    code = code or _run(REPORT, "4. The report again, with the probe.")
    if code == 0:
        pictures = "\n".join(f"  {path}" for path in sorted(RUNS.rglob("figures/*.png")))
        print(f"\nPictures:\n{pictures}\n\n{_table()}\n")
        print(f"Report: {RUNS}/report.md    total {time.monotonic() - started:.0f} s")
    return code


def _table() -> str:
    """What pretraining is worth: the same steps with and without it."""
    lines = [f"{'':34}pretrained   from scratch"]
    for task, score, name in (("finetune", "top1", "fine-tuning, top-1 in %"), ("segment", "miou", "segmentation, mIoU in %")):
        found = [read_scores(RUNS / run).get(score, float("nan")) for run in (task, f"{task}-scratch")]
        lines.append(f"{name:34}{100 * found[0]:10.1f}{100 * found[1]:15.1f}")
    return "\n".join(lines)


def _run(command: list[str], title: str, *, stop: bool = False) -> int:
    print(f"\n{title}\n$ {shlex.join(['python', *command])}", flush=True)
    stop = stop and _last_step() < STOP_AT_STEP
    process = subprocess.Popen([sys.executable, *command])
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
    file = RUNS / "pretrain" / "metrics.jsonl"
    rows = read_curve(file) if file.exists() else []
    return int(rows[-1]["step"]) if rows else 0


if __name__ == "__main__":
    sys.exit(main())
