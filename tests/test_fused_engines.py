"""Blocks on the project's kernels train under every engine as plain ones do under ddp: losses, gradients and weights.

Triton interprets the kernels, see tests/conftest.py; tests/test_gpu.py does the same on a GPU.
"""

import pytest
import torch

import test_engines
from nepa_dist import fused
from spawn import run_ranks
from test_engines import assert_equal, train

pytestmark = pytest.mark.skipif(torch.cuda.is_available() or fused.load() is not None, reason="needs Triton, interpreted")


RUNS = [(name, precision) for name in ("ddp", "fsdp2", "zero2") for precision in ("fp32", "bf16_params")]


def every_run():
    """Two steps of two micro-batches each, of a tiny model, for an interpreter is slow."""
    fused.kernels_obstacle = lambda *_: None  # all this is of a rank's own process
    fused.ROW_PROGRAMS = 4
    test_engines.MODEL = test_engines.MODEL | {"patch_size": 16}
    test_engines.BATCH = 8
    ours = {(name, precision): train(name, {"precision": precision, "kernels": "triton"}, 2) for name, precision in RUNS}
    return ours, {precision: train("ddp", {"precision": precision, "kernels": "torch"}, 2) for _, precision in RUNS[:2]}


@pytest.fixture(scope="module")
def results():
    return run_ranks(every_run, 2, timeout=200)


@pytest.mark.parametrize(("name", "precision"), RUNS)
def test_every_engine_trains_with_them_as_without(results, name, precision):
    exact = precision == "fp32"
    for ours, plain in results:
        rows, states, _, _ = ours[name, precision]
        plain_rows, plain_states, _, _ = plain[precision]
        assert [row[0] for row in rows] == pytest.approx([row[0] for row in plain_rows], abs=1e-6 if exact else 2e-3)
        # In bf16: Triton's interpreter cuts what it stores off instead of rounding.
        assert [row[1] for row in rows] == pytest.approx([row[1] for row in plain_rows], rel=1e-5 if exact else 5e-2)
        assert [row[2] for row in rows] == [1, 1]
        if exact:
            assert_equal(states[-1], plain_states[-1], atol=3e-6, rtol=1e-3)
