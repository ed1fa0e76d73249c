"""What the variants of a sweep have reached: ``table.md``, ``table.csv``, and pictures of scores and losses. Imports no torch.

``python -m jobs.sweep_report FOLDER`` writes them again. All is read from the folder of the sweep: ``sweep.yaml`` says what it
consists of, the folders of the runs how far they are.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import yaml

from jobs.pipeline_report import markdown_table
from jobs.runs import Outcome, Progress, last_line, newest_checkpoint, read_outcome, read_progress, read_scores
from nepa_dist.config import ConfigError, Section
from nepa_dist.config_load import read_yaml
from nepa_dist.run_folder import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUMMARY = "sweep.yaml"
"""In the folder of a sweep: its :class:`Summary`."""
FAILS = "fails"
"""What stands in place of the score of a variant that has given up."""


class Entry(Section):
    """One variant."""

    published: float | str | None
    """What others report: percent, or a word."""
    runs: dict[str, str]
    """Stage -> folder of its run below that of the sweep."""


class Summary(Section):
    """What a sweep consists of."""

    title: str
    score: str
    """STAGE.METRIC, what is compared."""
    variants: dict[str, Entry]


class Run(NamedTuple):
    """One stage of one variant, as its folder shows it."""

    stage: str
    folder: Path
    outcome: Outcome | None
    progress: Progress
    scores: dict[str, float]
    """Shares."""

    @property
    def state(self) -> str:
        """How it ended, or why there is no end."""
        return self.outcome.kind if self.outcome else "not ended" if self.folder.exists() else "not begun"

    @property
    def step(self) -> int | None:
        """The last one that is known of."""
        return self.progress.step or newest_checkpoint(self.folder)

    @property
    def reason(self) -> str:
        """Why it did not finish, in one line: what a rank has noted, or the last thing that the run said."""
        if self.outcome is None or self.outcome.kind in ("finished", "stopped"):
            return ""
        lines = (self.outcome.detail or last_line(self.folder / "log.txt")).strip().splitlines()
        return lines[-1] if lines else ""


class Row(NamedTuple):
    """One variant."""

    variant: str
    published: float | str | None
    runs: list[Run]
    """In the order of the stages."""
    score: float | None
    """Percent; None if it has none that is a number."""

    @property
    def ends(self) -> Run | None:
        """The first run that is not finished."""
        return next((run for run in self.runs if run.state != "finished"), None)

    @property
    def state(self) -> str:
        """How far it is."""
        if self.ends is None:
            return "finished" if self.score is not None else "finished without a score"
        return f"{self.ends.stage} {self.ends.state}"

    @property
    def has_failed(self) -> bool:
        """Whether it has given up, or has ended with a score that is no number: the result is that it fails."""
        return (self.score is None) if self.ends is None else self.ends.state == "gave up"

    @property
    def difference(self) -> float | None:
        """Ours less the published one, percentage points."""
        if self.score is None or self.published is None or isinstance(self.published, str):
            return None
        return self.score - self.published


def write_summary(root: Path, summary: Summary) -> None:
    """Leave word of what a sweep consists of; its folder exists."""
    write_text(root / SUMMARY, yaml.safe_dump(summary.model_dump(mode="json"), sort_keys=False))


def read_summary(root: Path) -> Summary:
    """What the sweep in a folder consists of.

    Raises:
        ValueError: ``sweep.yaml`` is missing, cannot be read, or is no summary.
    """
    return Summary.model_validate(read_yaml(root / SUMMARY))


def read_rows(root: Path, summary: Summary) -> list[Row]:
    """What the variants have reached, in the order of the sweep."""
    stage, _, metric = summary.score.partition(".")
    rows = []
    for variant, entry in summary.variants.items():
        runs = []
        for name, place in entry.runs.items():
            folder = root / place
            runs.append(Run(name, folder, read_outcome(folder), read_progress(folder), read_scores(folder)))
        done = all(run.state == "finished" for run in runs)
        value = next((run.scores.get(metric) for run in runs if run.stage == stage), None) if done else None
        score = 100 * value if value is not None and math.isfinite(value) else None
        rows.append(Row(variant, entry.published, runs, score))
    return rows


def write_table(root: Path) -> list[Path]:
    """Write ``table.md`` and ``table.csv`` of a sweep as far as it is; returns their paths."""
    summary = read_summary(root)
    rows = read_rows(root, summary)
    pictures = [root / name for name in ("scores.png", *_loss_names(rows)) if (root / name).exists()]
    head, *cells = _cells(summary, rows)
    lines = [f"# {summary.title or root.name}", "", *markdown_table(head, iter(cells))]
    if reasons := list(_reasons(rows)):
        lines += ["", *(f"- {reason}" for reason in reasons)]
    for path in pictures:
        lines += ["", f"![{path.stem}]({path.name})"]
    write_text(root / "table.md", "\n".join(lines) + "\n")
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(_csv(rows))
    write_text(root / "table.csv", text.getvalue())
    return [root / "table.md", root / "table.csv"]


def write_report(root: Path) -> list[Path]:
    """Write pictures, then tables that show them; returns all paths."""
    summary = read_summary(root)
    rows = read_rows(root, summary)
    pictures = [*_draw_scores(root, summary, rows), *_draw_losses(root, summary, rows)]
    return [*write_table(root), *pictures]


def show(root: Path) -> list[str]:
    """The table for a terminal, and what else is to be said."""
    summary = read_summary(root)
    rows = read_rows(root, summary)
    cells = _cells(summary, rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return [*lines, *_reasons(rows)]


def _cells(summary: Summary, rows: Sequence[Row]) -> list[list[str]]:
    """The lines of the table, the head first; what others report only where somebody does."""
    with_published = any(row.published is not None for row in rows)
    others = ["published, %", "difference"] if with_published else []
    lines = [["variant", f"{summary.score}, %", *others, "state", *(f"{run.stage} loss" for run in rows[0].runs)]]
    for row in rows:
        score = FAILS if row.has_failed else _number(row.score, 2)
        published = row.published if isinstance(row.published, str) else _number(row.published, 1)
        others = [published, _number(row.difference, 2, sign=True)] if with_published else []
        lines.append([row.variant, score, *others, row.state, *(_number(run.progress.loss, 4) for run in row.runs)])
    return lines


def _reasons(rows: Sequence[Row]) -> Iterator[str]:
    """Why variants did not finish, each reason of a shared run once."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.ends is not None and row.ends.reason:
            found.setdefault(f"{row.state}: {row.ends.reason} ({row.ends.folder})", []).append(row.variant)
    for reason, variants in found.items():
        yield f"{', '.join(variants)}: {reason}"


def _csv(rows: Sequence[Row]) -> Iterator[list[object]]:
    """All that is known, numbers unrounded. Scores as STAGE_METRIC, each a share."""
    scores = list(dict.fromkeys((run.stage, name) for row in rows for run in row.runs for name in run.scores))
    names = [f"{run.stage}_{column}" for run in rows[0].runs for column in ("state", "step", "loss", "folder")]
    columns = ["_".join(score) for score in scores]
    yield ["variant", "score_percent", "published", "difference", "state", "reason", *names, *columns]
    for row in rows:
        reason = row.ends.reason if row.ends else ""
        facts = [fact for run in row.runs for fact in (run.state, run.step, run.progress.loss, run.folder)]
        by_stage = {run.stage: run.scores for run in row.runs}
        values = [by_stage[stage].get(name) for stage, name in scores]
        yield [row.variant, row.score, row.published, row.difference, row.state, reason, *facts, *values]


def _number(value: float | None, digits: int, *, sign: bool = False) -> str:
    return "" if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def _draw_scores(root: Path, summary: Summary, rows: Sequence[Row]) -> list[Path]:
    """``scores.png``: a bar for each variant, ours and the published one side by side; none without any score."""
    if all(row.score is None for row in rows):
        return []
    from nepa_dist.pictures import save_figure

    series: list[tuple[str, str, list[float | str]]] = [
        ("this sweep", "#1f6fb4", [FAILS if row.has_failed else row.state if row.score is None else row.score for row in rows])
    ]
    if any(row.published is not None for row in rows):
        published: list[float | str] = ["" if row.published is None else row.published for row in rows]
        series.append(("published", "#b9bec6", published))
    height = 0.8 / len(series)

    def write(figure: Figure) -> None:
        axes = figure.subplots()
        for number, (label, color, values) in enumerate(series):
            places = [place + (number - (len(series) - 1) / 2) * height for place in range(len(rows))]
            lengths = [0.0 if isinstance(value, str) else value for value in values]
            axes.barh(places, lengths, height, color=color, label=label)
            for place, length, value in zip(places, lengths, values, strict=True):
                text = value if isinstance(value, str) else f"{value:.1f}"
                axes.annotate(text, (length, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
        axes.set_yticks(range(len(rows)), [row.variant for row in rows])
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlim(left=0)
        axes.set_xlabel(f"{summary.score}, %")
        axes.spines[["top", "right"]].set_visible(False)
        if len(series) > 1:
            axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))

    path = root / "scores.png"
    save_figure(path, summary.title or root.name, (7.2, 1.3 + 0.5 * len(rows)), write)
    return [path]


def _loss_names(rows: Sequence[Row]) -> list[str]:
    return [f"loss-{run.stage}.png" for run in rows[0].runs]


def _draw_losses(root: Path, summary: Summary, rows: Sequence[Row]) -> list[Path]:
    """``loss-STAGE.png`` of each stage: the curves of all variants; one curve where they share the run."""
    from nepa_dist.curves import plot_lines
    from nepa_dist.metrics.sinks import read_curve

    paths = []
    for index, name in enumerate(_loss_names(rows)):
        series = {}
        shared = len({row.runs[index].folder for row in rows}) < len(rows)
        for row in rows[:1] if shared else rows:
            file = row.runs[index].folder / "metrics.jsonl"
            curve = [(point["step"], point.get("loss", math.nan)) for point in (read_curve(file) if file.exists() else [])]
            if points := [(step, loss) for step, loss in curve if math.isfinite(loss)]:
                series["all" if shared else row.variant] = ([step for step, _ in points], [loss for _, loss in points])
        if series:
            title = f"{summary.title or root.name}: {rows[0].runs[index].stage}"
            plot_lines(root / name, series, xlabel="step", ylabel="loss", title=title, smooth=True)
            paths.append(root / name)
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.sweep_report", description="Write the tables and pictures of a sweep again, and show them."
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of a sweep; it holds sweep.yaml")
    arguments = parser.parse_args(argv)
    try:
        for root in map(Path.absolute, arguments.folders):
            print("\n".join([*(f"wrote {path}" for path in write_report(root)), *show(root)]))
    except (ConfigError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
