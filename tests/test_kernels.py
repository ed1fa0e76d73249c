"""The kernels of a block compile for a GPU, also where there is none: an interpreter takes what a compiler does not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nepa_dist import fused

ROOT = Path(__file__).resolve().parents[1]


def assembler() -> Path | None:
    """NVIDIA's, as it comes with Triton."""
    if fused.load() is not None:
        return None
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


def compile_all():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "compile_kernels.py")]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)


@pytest.mark.skipif(not (path := assembler()) or not path.is_file(), reason="needs Triton with NVIDIA's assembler")
def test_every_launch_compiles_for_compute_capability_9():
    done = compile_all()
    assert done.returncode == 0, done.stdout + done.stderr
    number, word = done.stdout.split()
    assert word == "launches"
    assert int(number) > 50
