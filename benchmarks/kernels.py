"""Time what a block is made of, each by itself: ``python -m benchmarks.kernels --model vit_l --batch 256``.

Copies of the GPU's memory, the kernels between the products (through the autograd functions of :mod:`nepa_dist.fused`, as a
step calls them, and as torch.compile makes them of the plain operations), attention and products; forward and backward, in the
dtypes of ``bf16_autocast``. Reports milliseconds, TB/s of the bytes that must move (each input read and each output written
once), TFLOP/s. A GPU begins with the calls of an interval when all are queued, so the host's time does not count. At the sizes
of a step tensors are larger than caches.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.pieces import Piece, attention_inputs, make_pieces, make_products
from benchmarks.rounds import place, spread, synchronize
from benchmarks.step import _SWITCH, RESULTS, count, make_config, write
from nepa_dist import fused, presets
from nepa_dist.attention import choose_attention
from nepa_dist.config_model import ModelConfig
from nepa_dist.plan import make_plan

ATTENTION = ("sdpa", "flash", "cudnn", "efficient")
_COPIED = {"cuda": 1 << 32, "cpu": 1 << 20}
"""Bytes that are copied."""
_CYCLES = 2e9
"""Of a GPU in a second, about."""


class Call(NamedTuple):
    """Something that is timed."""

    group: str
    """``copy``, ``kernel``, ``attention`` or ``product``."""
    name: str
    by: str
    """Whose it is, or what it is: ``ours``, ``compiled``, the name of an attention, the sizes of a product."""
    way: str
    """``forward``, ``backward``, or whose gradient."""
    run: Callable[[], Any]
    bytes: int = 0
    """That must move."""
    flops: int = 0


def time_calls(run: Callable[[], Any], calls: int, device: torch.device, issue_seconds: float = 0.0) -> float:
    """Seconds of one call, the mean of several.

    Args:
        run: what is called.
        calls: how many times.
        device: where it runs.
        issue_seconds: what the host takes to issue all calls. A GPU is kept busy for twice that long before it begins.
    """
    synchronize(device)
    if device.type == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(2 * issue_seconds * _CYCLES))
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    synchronize(device)
    return begin.elapsed_time(end) / 1e3 / calls


def measure(group: Sequence[Call], device: torch.device, *, rounds: int, calls: int, warmup: int) -> list[dict[str, Any]]:
    """Time calls in turn, round by round; a row for each. One that cannot run has the reason in its row."""
    rows, ready, issue = [], [], {}
    for number, call in enumerate(group):
        rows.append({key: value for key, value in call._asdict().items() if key != "run"})
        try:
            for _ in range(max(1, warmup)):
                call.run()
            synchronize(device)
        except (RuntimeError, ValueError) as error:  # an attention that this device, dtype or head width does not have
            if call.group != "attention":
                raise
            rows[number]["failed"] = str(error).strip().splitlines()[0]
            continue
        start = time.perf_counter()
        for _ in range(calls):
            call.run()
        issue[number] = time.perf_counter() - start
        ready.append(number)
    seconds: dict[int, list[float]] = {number: [] for number in ready}
    for turn in range(rounds):
        for number in ready if turn % 2 == 0 else ready[::-1]:
            seconds[number].append(time_calls(group[number].run, calls, device, issue[number]))
    for number in ready:
        found = spread(seconds[number])
        rows[number]["milliseconds"] = {key: 1e3 * value for key, value in found.items()}
        rows[number]["tb_per_second"] = rows[number]["bytes"] / found["median"] / 1e12
        rows[number]["tflops"] = rows[number]["flops"] / found["median"] / 1e12
    return rows


def copy_calls(device: torch.device) -> list[Call]:
    """A copy from the device's memory to itself."""
    source = torch.empty(_COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return [Call("copy", "copy", "torch", "", lambda: target.copy_(source), 2 * source.numel())]


def piece_calls(piece: Piece, compiled: bool) -> list[Call]:
    """A piece by the project's kernels and, if wanted, by what torch.compile makes of the plain function."""
    outputs = piece.ours(*piece.inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = tuple(torch.randn_like(out) for out in outputs)
    runs: dict[tuple[str, str], Callable[[], Any]] = {
        ("ours", "forward"): lambda: piece.ours(*piece.inputs),
        ("ours", "backward"): lambda: torch.autograd.grad(outputs, piece.inputs, gradients, retain_graph=True),
    }
    if compiled:
        inputs = [value.detach() for value in piece.inputs]
        plain, pulled = torch.compile(piece.plain), torch.compile(piece.pull)
        runs["compiled", "forward"] = lambda: plain(*inputs)
        runs["compiled", "backward"] = lambda: pulled(inputs, gradients)
    moved = {"forward": piece.forward_bytes, "backward": piece.backward_bytes}
    return [Call("kernel", piece.name, by, way, run, moved[way]) for (by, way), run in runs.items()]


def attention_calls(model: ModelConfig, batch: int, tokens: int, device: torch.device) -> list[Call]:
    """Causal attention, each implementation both ways; backward counts two and a half times as much, with the scores again."""
    q, k, v = attention_inputs(model, batch, tokens, device)
    flops = 2 * batch * model.embed_dim * tokens * (tokens + 1)
    calls = []
    for name in ATTENTION:
        kept: list[Tensor] = []

        def forward(name: str = name) -> Tensor:
            return choose_attention(name, device)(q, k, v, True)

        def backward(forward: Callable[[], Tensor] = forward, kept: list[Tensor] = kept) -> Any:
            if not kept:
                kept.append(forward())
                kept.append(torch.randn_like(kept[0]))
            return torch.autograd.grad(kept[0], (q, k, v), kept[1], retain_graph=True)

        calls.append(Call("attention", "attention", name, "forward", forward, flops=flops))
        calls.append(Call("attention", "attention", name, "backward", backward, flops=5 * flops // 2))
    return calls


def groups(model: ModelConfig, batch: int, tokens: int, device: torch.device, compiled: bool) -> Iterator[list[Call]]:
    """What takes turns, one group after the other, each with tensors of its own."""
    yield copy_calls(device)
    for make in make_pieces(model, batch, tokens, device):
        yield piece_calls(make(), compiled)
    yield attention_calls(model, batch, tokens, device)
    for product in make_products(model, batch * tokens, device):
        yield [Call("product", product.name, product.sizes, way, run, flops=product.flops) for way, run in product.runs.items()]


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Measure everything."""
    import triton

    device = torch.device(args.device)
    config = make_config(args.model, args.batch, 1)
    tokens = make_plan(config, 10**6).num_tokens
    about = place(device)
    about["versions"]["triton"] = triton.__version__
    rows = []
    # The gradients of all pieces are one function to the compiler: each is to be compiled for its own shapes.
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=1000):
        for group in groups(config.model, args.batch, tokens, device, _SWITCH[args.compile]):
            rows += measure(group, device, rounds=args.rounds, calls=args.calls, warmup=args.warmup)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": about,
        "model": args.model,
        "batch": args.batch,
        "tokens": tokens,
        "width": config.model.embed_dim,
        "heads": config.model.num_heads,
        "hidden": config.model.mlp_hidden_dim_,
        "rounds": args.rounds,
        "calls": args.calls,
        "cuda": device.type == "cuda",
        "rows": rows,
    }


def _line(row: dict[str, Any], rate: str) -> str:
    """A row of a table; rate: the key of what it ends with."""
    if "failed" in row:
        return f"| {row['name']} | {row['by']} | {row['way']} | not here: {row['failed']} | |"
    found = row["milliseconds"]
    times = f"**{found['median']:.3f}** ({found['low']:.3f} - {found['high']:.3f})"
    return f"| {row['name']} | {row['by']} | {row['way']} | {times} | {row[rate]:.4g} |"


def to_markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    about, rows = report["machine"], report["rows"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines = [
        f"# Kernels of {report['model']}, {about['device']}, {report['date']}",
        "",
        f"    {report['command']}",
        "",
        f"Commit {about['commit']}; Python {about['python']}, {versions}. {report['batch'] * report['tokens']} tokens "
        f"({report['batch']} images of {report['tokens']}), width {report['width']}, {report['heads']} heads, hidden width "
        f"{report['hidden']}. {report['rounds']} rounds of {report['calls']} calls; milliseconds of one call, median of the "
        "rounds (lowest - highest).",
        "",
        "Between the products: GB is what must move, each input read and each output written once; backward with all sums over "
        "tokens. compiled: by torch.compile from the plain operations.",
        "",
        "| piece | by | way | milliseconds | TB/s | GB |",
        "|---|---|---|---|---|---|",
    ]
    lines += [f"{_line(row, 'tb_per_second')} {row['bytes'] / 1e9:.3f} |" for row in rows if row["group"] in ("copy", "kernel")]
    lines += ["", "Attention and products; attention counted below the diagonal, with the scores again in backward:", ""]
    lines += ["| | by | way | milliseconds | TFLOP/s |", "|---|---|---|---|---|"]
    lines += [_line(row, "tflops") for row in rows if row["group"] in ("attention", "product")]
    return "\n".join(lines) + "\n"


def obstacle(device: str) -> str | None:
    """Why nothing can be measured, if so."""
    if device == "cuda" and not torch.cuda.is_available():
        return "this benchmark needs a GPU, and there is none"
    if reason := fused.load():
        return reason
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "on a CPU the kernels run with TRITON_INTERPRET=1 only"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_l", choices=list(presets.PRESETS))
    parser.add_argument("--batch", type=count, default=256, metavar="B", help="images")
    parser.add_argument("--compile", default="on", choices=list(_SWITCH), help="also time what torch.compile makes")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: for tests, with TRITON_INTERPRET=1")
    parser.add_argument("--rounds", type=count, default=9)
    parser.add_argument("--calls", type=count, default=10, help="per round")
    parser.add_argument("--warmup", type=count, default=3, help="calls before the first round")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="where the report goes")
    args = parser.parse_args(argv)
    if reason := obstacle(args.device):
        print(f"error: {reason}", file=sys.stderr)
        return 1
    report = benchmark(args)
    report["command"] = shlex.join(["python", "-m", "benchmarks.kernels", *(sys.argv[1:] if argv is None else argv)])
    write(report, to_markdown(report), args.out, "kernels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
