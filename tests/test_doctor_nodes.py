"""``doctor --nodes``: real ranks on this machine, and which node is named for what they report."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs import submit
from jobs.cluster import REPO_ROOT
from jobs.doctor_nodes import describe, find_problems


def test_the_ranks_of_this_machine_are_fit(tmp_path: Path) -> None:
    words = ["doctor", "--nodes", "1", "--cluster", "local", "--gpus-per-node", "2"]
    script = str(REPO_ROOT / "jobs" / "submit.py")
    done = subprocess.run([sys.executable, script, *words], cwd=tmp_path, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines[0].split()[:3] == ["rank", "node", "device"]
    assert [line.split()[0] for line in lines[1:3]] == ["0", "1"]
    assert all(line.endswith("done") for line in lines[1:3]), done.stdout + done.stderr
    assert "a sum of 67 MB over all 2 ranks takes" in done.stdout
    assert list((tmp_path / "runs").iterdir()) == [], "what it wrote is gone"


def good(rank: int, **more: Any) -> dict[str, Any]:
    values = {"rank": rank, "node": f"node{rank // 2}", "phase": "done", "device": "H100", "driver": "580", "torch": "2.13"}
    values |= {"gflops": 500_000.0, "pair_bytes_per_second": 1e10, "clock_offset_seconds": 0.001, "all_reduce_seconds": 0.01}
    return values | ({"write_bytes_per_second": 1e9, "read_bytes_per_second": 2e9} if rank % 2 == 0 else {}) | more


def problems(*changed: dict[str, Any], count: int = 8, missing: tuple[int, ...] = ()) -> list[str]:
    reports = {rank: good(rank) for rank in range(count) if rank not in missing}
    reports |= {report["rank"]: report for report in changed}
    return list(find_problems(list(reports.values()), count, 2))


def test_good_nodes_have_no_problems() -> None:
    assert problems() == []
    lines, bad = describe([good(rank) for rank in range(8)], 8, 2)
    assert not bad
    assert lines[-1] == "All nodes are fit."


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"rank": 5, "gflops": 200_000.0}, "node2: rank 5 computes 200000 GFLOP/s, the others 500000"),
        ({"rank": 4, "write_bytes_per_second": 1e7}, "node2: rank 4 writes 10 MB/s, the others 1000"),
        ({"rank": 3, "pair_bytes_per_second": 1e8}, "node1: rank 3 sends to rank 0 100 MB/s, the others 10000"),
        ({"rank": 6, "clock_offset_seconds": -7.5}, "node3: its clock is -7.5 s off that of rank 0"),
        ({"rank": 7, "driver": "570"}, "node3: driver 570, elsewhere 580"),
        (
            {"rank": 2, "phase": "compute", "error": "RuntimeError: no CUDA"},
            "node1: rank 2 failed in a product of matrices: RuntimeError: no CUDA",
        ),
    ],
)
def test_the_bad_node_is_named(changed: dict[str, Any], expected: str) -> None:
    (problem,) = problems(good(changed["rank"]) | changed)
    assert problem.startswith(expected)


def test_those_that_wait_for_a_bad_node_are_not_blamed() -> None:
    """Rank 5 cannot write; all others wait for it in vain."""
    waiting = [good(rank, phase="join", error="RuntimeError: timed out") for rank in range(8) if rank != 5]
    found = problems(*waiting, good(5, phase="storage", error="OSError: no space"))
    assert found == ["node2: rank 5 failed in writing to the folder of the runs: OSError: no space"]


def test_a_rank_that_never_started_is_named_with_its_node() -> None:
    assert problems(missing=(3,))[0] == "node1: rank 3 never started"
    assert problems(missing=(2, 3))[0] == "node 1 of the job: rank 2 never started"


def test_mistakes_are_told(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert submit.main(["doctor", "--nodes", "2", "--cluster", "moon"]) == 2
    assert "local, slurm" in capsys.readouterr().err
    assert submit.main(["doctor", "--nodes", "0"]) == 2
    assert "greater than 0" in capsys.readouterr().err
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    assert submit.main(["doctor", "--nodes", "2"]) == 2
    assert "srun is not on PATH" in capsys.readouterr().err
