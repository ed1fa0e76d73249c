"""Compile the kernels of a block for a GPU that is not there: ``python tests/compile_kernels.py``.

The autograd functions of :mod:`nepa_dist.fused` run as in a step, but their launches are only written down; Triton's compiler
then makes machine code of each. So what is compiled has the types, constants and sizes that a step has. To be run in a process
without TRITON_INTERPRET. Prints what fails, with the compiler's words, and which kernel no case launched; then it ends with 1.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nepa_dist import fused
from nepa_dist.presets import mlp_hidden_dim

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", int: "i32"}
BF16, FP32 = torch.bfloat16, torch.float32
# Dtype of the residual stream, of what products give, of parameters; width, heads; whether affine, kept, gated, gelu.
AUTOCAST, IN_FP32, IN_BF16 = (FP32, BF16, FP32), (FP32, FP32, FP32), (BF16, BF16, BF16)
CASES = [
    (AUTOCAST, 192, 3, False, False, True, False),
    (AUTOCAST, 768, 12, True, True, False, True),
    (AUTOCAST, 1024, 16, False, False, True, True),
    (AUTOCAST, 1024, 16, True, True, False, False),
    (AUTOCAST, 1280, 16, True, False, True, False),
    (IN_FP32, 192, 3, True, True, True, False),
    (IN_FP32, 1280, 16, False, False, False, True),
    (IN_BF16, 768, 12, False, False, True, False),
    (IN_BF16, 1024, 16, True, True, False, True),
]


class Launch(NamedTuple):
    """One launch: what the compiler has to know of it."""

    kernel: str
    types: tuple[str, ...]
    """Of the arguments that are no constants, in order."""
    constants: tuple[tuple[str, Any], ...]


class Recorder:
    """Stands in for the module of the kernels."""

    def __init__(self) -> None:
        self.launches: dict[Launch, None] = {}

    def __getattr__(self, kernel: str) -> Recorder._Kernel:
        return self._Kernel(self.launches, kernel)

    class _Kernel:
        def __init__(self, launches: dict[Launch, None], kernel: str) -> None:
            self.launches, self.kernel = launches, kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Recorder._Kernel:
            return self

        def __call__(self, *arguments: Tensor | int, **constants: Any) -> None:
            types = (TYPES[a.dtype if isinstance(a, Tensor) else type(a)] for a in arguments)
            self.launches[Launch(self.kernel, tuple(types), tuple(constants.items()))] = None


def run_block(dtypes: tuple[torch.dtype, ...], D: int, heads: int, affine: bool, kept: bool, gated: bool, gelu: bool) -> None:
    """Forward and backward of all that lies between the products of a block, on whatever numbers."""
    B, T, H = 2, 16, mlp_hidden_dim(D, 4.0, gated)
    stream, product, parameter = dtypes

    def make(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    width = 2 * H if gated else H
    vector, of_qkv, of_h = (make(size, dtype=parameter) for size in (D, 3 * D, width))
    x, branch = make(B, T, D, dtype=stream), make(B, T, D, dtype=product)
    of_image = torch.ones(B) if kept else None
    tables = (torch.zeros(T, D // heads) for _ in range(2))
    weights = make(2, D // heads, dtype=parameter) if affine else None
    outputs = [
        *fused.Heads.apply(make(B, T, 3 * D, dtype=product), of_qkv, weights, *tables, heads, 1e-12),
        *fused.AddNorm.apply(x, branch, vector, vector, of_image, vector, vector, 1e-12),
        fused.Activation.apply(make(B, T, width, dtype=product), of_h, gated, gelu),
        fused.Add.apply(x, branch, vector, vector, of_image),
    ]
    torch.autograd.backward(outputs, [torch.zeros_like(out) for out in outputs])


def compile_launch(module: Any, launch: Launch) -> str | None:
    """Compile what was launched, or say why it cannot be done."""
    function = getattr(module, launch.kernel)
    constants = dict(launch.constants)
    options = {"num_warps": constants.pop("num_warps")}
    names = function.arg_names
    types = dict(zip((name for name in names if name not in constants), launch.types, strict=True))
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if name in types}
    source = ASTSource(function, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    try:
        triton.compile(source, target=TARGET, options=options)
    except Exception as error:  # of whatever kind: the compiler has many
        return f"{launch}: {error}"
    return None


def main() -> int:
    """Returns the exit code."""
    recorder = Recorder()
    if reason := fused.load():
        raise SystemExit(reason)
    module, fused.kernels = fused.kernels, recorder
    for case in CASES:
        run_block(*case)
    kernels = {name for name, value in vars(module).items() if isinstance(value, triton.JITFunction) and name[0] != "_"}
    failures = [f"{name} was not launched" for name in kernels - {launch.kernel for launch in recorder.launches}]
    with ThreadPoolExecutor(2) as pool:
        failures += [text for text in pool.map(lambda launch: compile_launch(module, launch), recorder.launches) if text]
    print(f"{len(recorder.launches)} launches", *failures, sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
