"""What a sweep has found: ``table.md``, ``table.csv``, and pictures of the curves and of the scores beside published ones.

``python -m jobs.sweep_table FOLDER`` writes them again. Imports no torch.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from jobs.pipeline_report import markdown_table
from jobs.runs import read_outcome, read_progress, read_scores
from nepa_dist.metrics.sinks import read_curve
from nepa_dist.run_folder import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPEC = "sweep.yaml"
"""In the folder of a sweep: what it consists of."""


class Row(NamedTuple):
    """One variant."""

    name: str
    state: str
    step: int | None
    loss: float | None
    scores: dict[str, float]
    """In percent."""
    published: float | None

    def value(self, score: str) -> float | None:
        """What the variant is compared by."""
        return self.loss if score == "loss" else self.scores.get(score)


def read_rows(root: Path, spec: Mapping[str, Any]) -> list[Row]:
    """What the runs of a sweep say, in the order of its file."""
    rows = []
    for name, fields in spec["variants"].items():
        run = root / name
        progress, outcome = read_progress(run), read_outcome(run)
        state = outcome.kind if outcome else "not ended" if run.exists() else "not begun"
        scores = {key: 100 * value for key, value in read_scores(run).items()}
        published = (fields or {}).get("published")
        rows.append(Row(name, state, progress.step, progress.loss, scores, None if published is None else float(published)))
    return rows


def write_table(root: Path) -> list[Path]:
    """Write table and pictures of the sweep in a folder; returns their paths."""
    spec = yaml.safe_load((root / SPEC).read_text(encoding="utf-8"))
    score, rows = str(spec.get("score", "loss")), read_rows(root, spec)
    columns = list(dict.fromkeys(name for row in rows for name in row.scores))
    with_published = any(row.published is not None for row in rows)
    head = ["variant", "state", "step", "loss", *columns, *(["published", "difference"] if with_published else [])]
    cells = [_cells(row, columns, score, with_published) for row in rows]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *cells])
    unit = "" if score == "loss" else ", percent"
    lines = [f"# {root.name}", "", f"Compared by {score}{unit}.", "", *markdown_table(head, iter(cells))]
    pictures = _draw(root, rows, score, unit)
    lines += [line for path in pictures for line in ("", f"![{path.stem}]({path.relative_to(root).as_posix()})")]
    write_text(root / "table.csv", text.getvalue())
    write_text(root / "table.md", "\n".join(lines) + "\n")
    return [root / "table.md", root / "table.csv", *pictures]


def _cells(row: Row, columns: Sequence[str], score: str, with_published: bool) -> list[str]:
    step = "" if row.step is None else str(row.step)
    cells = [row.name, row.state, step, _number(row.loss, 4), *(_number(row.scores.get(name), 2) for name in columns)]
    if with_published:
        ours = row.value(score)
        difference = None if ours is None or row.published is None else ours - row.published
        cells += [_number(row.published, 2), _number(difference, 2, sign=True)]
    return cells


def _number(value: float | None, digits: int, *, sign: bool = False) -> str:
    return "" if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def _draw(root: Path, rows: Sequence[Row], score: str, unit: str) -> list[Path]:
    from nepa_dist.curves import plot_lines
    from nepa_dist.pictures import save_figure

    paths = []
    curves = {}
    for row in rows:
        file = root / row.name / "metrics.jsonl"
        points = [point for point in (read_curve(file) if file.exists() else []) if "loss" in point]
        if points:
            curves[row.name] = ([point["step"] for point in points], [point["loss"] for point in points])
    if curves:
        paths.append(root / "figures" / "loss.png")
        plot_lines(paths[0], curves, xlabel="step", ylabel="loss", title=root.name, smooth=True)
    shown = [row for row in rows if row.value(score) is not None]
    if shown and score != "loss":

        def draw(figure: Figure) -> None:
            axes = figure.subplots()
            places = range(len(shown))
            axes.barh([place - 0.2 for place in places], [row.value(score) or 0.0 for row in shown], 0.4, label="this sweep")
            published = [(place + 0.2, row.published) for place, row in enumerate(shown) if row.published is not None]
            if published:
                axes.barh([place for place, _ in published], [value for _, value in published], 0.4, label="published")
                axes.legend(frameon=False)
            axes.set_yticks(list(places), [row.name for row in shown])
            axes.invert_yaxis()
            axes.set_xlabel(f"{score}{unit}")

        paths.append(root / "figures" / "scores.png")
        save_figure(paths[-1], root.name, (7.2, 1.2 + 0.5 * len(shown)), draw)
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    folders = [Path(word).absolute() for word in (sys.argv[1:] if argv is None else argv)]
    for root in folders:
        print("\n".join(f"wrote {path}" for path in write_table(root)))
    return 0 if folders else 2


if __name__ == "__main__":
    sys.exit(main())
