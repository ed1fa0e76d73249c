"""report.md of a pipeline: a table of its stages, and their curves and pictures as links. Imports no torch.

``python -m jobs.pipeline_report FOLDER`` draws what is missing and writes it again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from jobs.control import read_config
from jobs.probe import with_our_code
from jobs.runs import newest_checkpoint, read_json, read_outcome, read_progress, read_scores
from nepa_dist.config import ConfigError
from nepa_dist.run_folder import write_text

_PICTURES = ("figures", "best")
"""Folders of a run in which stages leave pictures."""
_SAMPLES = "0,1,2"
"""Of the validation split, in the pictures of what a model sees."""


def draw_samples(run_dir: Path) -> None:
    """Draw what a run sees in a few validation images: its maps, or the classes of their pixels.

    Does nothing where that is drawn already, and for a classifier, which has no pictures of its own. What cannot be drawn is
    told and ends nothing.
    """
    newest = newest_checkpoint(run_dir)
    try:
        if newest is None or read_config(run_dir).task == "finetune":
            return
    except ConfigError as error:
        print(f"{run_dir.name}: no pictures of what it sees: {error}", file=sys.stderr, flush=True)
        return
    drawn = run_dir / "figures" / ".samples"
    if drawn.exists() and drawn.read_text() == str(newest):
        return
    command = [sys.executable, "-P", "-m", "nepa_dist.visualize", str(run_dir), "--samples", _SAMPLES]
    if subprocess.run(command, env=with_our_code(), check=False).returncode:
        print(f"{run_dir.name}: no pictures of what it sees; the report goes without", file=sys.stderr, flush=True)
    else:
        write_text(drawn, str(newest))


def write_report(root: Path, run_dirs: Sequence[Path]) -> Path:
    """Write ``root/report.md`` about runs that lie below ``root``; returns its path.

    Args:
        root: folder of the pipeline.
        run_dirs: the stages in order; those that have not begun are listed as such.
    """
    lines = [f"# {root.name}", "", *markdown_table(("stage", "state", "steps", "loss", "scores", "images/s"), _rows(run_dirs))]
    for run_dir in run_dirs:
        lines += _section(root, run_dir)
    path = root / "report.md"
    write_text(path, "\n".join(lines) + "\n")
    return path


def markdown_table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    cells = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(row) + " |" for row in cells]


def format_scores(scores: dict[str, float]) -> str:
    """Scores, each a share, in percent."""
    return ", ".join(f"{name} {100 * value:.2f} %" for name, value in scores.items())


def _rows(run_dirs: Sequence[Path]) -> Iterator[Sequence[str]]:
    for run_dir in run_dirs:
        progress, outcome = read_progress(run_dir), read_outcome(run_dir)
        state = outcome.kind if outcome else "not ended" if run_dir.exists() else "not begun"
        step = progress.step or newest_checkpoint(run_dir)
        steps = "" if step is None else f"{step:,}" + (f" of {progress.total:,}" if progress.total else "")
        loss = "" if progress.loss is None else f"{progress.loss:.4f}"
        rate = "" if progress.images_per_second is None else f"{progress.images_per_second:.0f}"
        yield run_dir.name, state, steps, loss, format_scores(read_scores(run_dir)), rate


def _section(root: Path, run_dir: Path) -> Iterator[str]:
    if not run_dir.exists():
        return
    yield from ("", f"## {run_dir.name}", "")
    place = run_dir.relative_to(root)
    files = [name for name in ("config.yaml", "log.txt", "metrics.jsonl", "evaluation.json") if (run_dir / name).exists()]
    files += [f"best/{name}" for name in ("results.json", "per_class.csv") if (run_dir / "best" / name).exists()]
    yield " · ".join(f"[{name}]({place.as_posix()}/{name})" for name in files)
    if (outcome := read_outcome(run_dir)) and outcome.detail:
        yield from ("", "```", outcome.detail.strip(), "```")
    pictures = [path for folder in _PICTURES for path in sorted((run_dir / folder).rglob("*.png"))]
    for path in pictures:
        yield from ("", f"![{path.stem}]({path.relative_to(root).as_posix()})")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # in order with the lines of who draws
    parser = argparse.ArgumentParser(prog="python -m jobs.pipeline_report", description="Write the report of a pipeline again.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of a pipeline; its runs are in it")
    for root in map(Path.absolute, parser.parse_args(argv).folders):
        runs = [path.parent for path in root.glob("*/config.yaml")]
        for run_dir in runs:
            draw_samples(run_dir)
        # In the order in which they began, so that the first stage is the first.
        print(f"wrote {write_report(root, sorted(runs, key=_began))}")
    return 0


def _began(run_dir: Path) -> tuple[float, str]:
    starts = read_json(run_dir / "run.json").get("starts") or []
    return (0.0, str(starts[0].get("started"))) if starts else (1.0, run_dir.name)


if __name__ == "__main__":
    sys.exit(main())
