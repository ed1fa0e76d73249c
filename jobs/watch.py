"""Shows the main curves of a run in the terminal: python jobs/submit.py watch RUN. Imports no torch.

Braille characters draw two by four dots each. The picture is drawn again while the run goes on; in a pipe, or with ``--once``,
it is drawn once.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence

from jobs.runs import named_run
from nepa_dist.metrics.registry import lookup
from nepa_dist.metrics.sinks import read_curve

KEYS = (
    *("loss", "grad_norm", "embedding_effective_rank.target", "embedding_mean_cosine.target"),
    *("prediction_skill_copy", "top1", "miou", "images_per_second"),
)
"""What is shown by default, of what the run has."""
LOGARITHMIC = {"grad_norm"}
SECONDS = 2.0
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


def main(argv: Sequence[str]) -> int:
    """Parse, then draw; returns the exit code, 2 for a mistake to correct."""
    parser = argparse.ArgumentParser(prog="python jobs/submit.py watch", description="The curves of a run, in the terminal.")
    parser.add_argument("run", type=named_run, metavar="RUN", help="folder of the run")
    parser.add_argument(
        "--key", action="append", metavar="KEY", help="a metric to show, again for more (default: the main ones)"
    )
    parser.add_argument("--once", action="store_true", help="draw once and end")
    args = parser.parse_args(argv)
    file = args.run / "metrics.jsonl"
    try:
        for key in args.key or ():
            lookup(key)
        if not file.exists():
            raise FileNotFoundError(f"{args.run} has no metrics.jsonl: it is no run, or has logged nothing yet")
        again = sys.stdout.isatty() and not args.once
        while True:
            size = shutil.get_terminal_size((100, 40))
            picture = draw(read_curve(file), args.key or KEYS, size.columns, size.lines - 1 if again else 40)
            print(f"\x1b[H\x1b[2J{picture}" if again else picture, flush=True)
            if not again:
                return 0
            time.sleep(SECONDS)
    except KeyError as error:
        print(error.args[0], file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0


def draw(rows: Sequence[Mapping[str, float]], keys: Sequence[str], width: int, height: int) -> str:
    """The picture: two panels beside each other where there is room.

    Args:
        rows: of ``metrics.jsonl``.
        keys: metrics in order; those without a value are left out.
        width: characters.
        height: lines, at most.
    """
    curves = {key: [(row["step"], row[key]) for row in rows if key in row] for key in keys}
    curves = {key: points for key, points in curves.items() if points}
    if not curves:
        return "nothing has been logged yet"
    columns = 2 if width >= 90 and len(curves) > 1 else 1
    lines = -(-len(curves) // columns)
    panel_width, panel_height = width // columns - 2, min(14, max(4, (height - 1) // lines - 2))
    panels = [_panel(key, points, panel_width, panel_height) for key, points in curves.items()]
    text = [_headline(rows[-1])]
    for start in range(0, len(panels), columns):
        text += ["  ".join(parts).rstrip() for parts in zip(*panels[start : start + columns], strict=True)]
    return "\n".join(text)


def _headline(row: Mapping[str, float]) -> str:
    parts = [f"step {row['step']:.0f}"]
    if "planned_steps" in row:
        parts[0] += f"/{row['planned_steps']:.0f}"
    for key, text in (("eta_seconds", "eta {:.0f} s"), ("goodput_ratio", "goodput {:.1%}"), ("mfu", "MFU {:.1%}")):
        if key in row and math.isfinite(row[key]):
            parts.append(text.format(row[key]))
    return "   ".join(parts)


def _panel(key: str, points: Sequence[tuple[float, float]], width: int, height: int) -> list[str]:
    """A title and ``height`` lines of the curve, each ``width`` characters."""
    log = key in LOGARITHMIC
    usable = [(x, math.log10(y) if log else y) for x, y in points if math.isfinite(y) and (y > 0 or not log)]
    broken = len(points) - sum(math.isfinite(y) for _, y in points)
    title = f"{key}  {points[-1][1]:.4g}" + (f"  ({broken} not finite)" if broken else "")
    margin = 9
    if not usable:
        return [title[:width].ljust(width), *[" " * width] * height]
    low, high = min(y for _, y in usable), max(y for _, y in usable)
    first, last = usable[0][0], usable[-1][0]
    cells = [[0] * (width - margin) for _ in range(height)]
    dots = [
        (
            round((x - first) / ((last - first) or 1) * (2 * (width - margin) - 1)),
            round((high - y) / ((high - low) or 1) * (4 * height - 1)),
        )
        for x, y in usable
    ]
    for (left, start), (right, end) in zip(dots, dots[1:] or dots, strict=False):
        for part in range(count := max(right - left, abs(end - start), 1)):
            column, row = left + round(part / count * (right - left)), start + round(part / count * (end - start))
            cells[row // 4][column // 2] |= _DOTS[column % 2][row % 4]
    cells[dots[-1][1] // 4][dots[-1][0] // 2] |= _DOTS[dots[-1][0] % 2][dots[-1][1] % 4]
    text = [title[:width].ljust(width)]
    for number, line in enumerate(cells):
        at_end = {0: high, height - 1: low}.get(number)
        label = "" if at_end is None else f"{10**at_end if log else at_end:.3g}"
        text.append(f"{label:>{margin - 2}} │" + "".join(chr(0x2800 + dots) for dots in line))
    return text
