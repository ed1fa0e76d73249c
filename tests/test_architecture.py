"""The project keeps the rules of tests/architecture.py, and those checks do find what breaks a rule."""

from __future__ import annotations

import graphlib
import subprocess
import sys
from pathlib import Path

import pytest
from architecture import ARROWS, PACKAGES, check, unused_arrows

ROOT = Path(__file__).parent.parent


def test_the_project_keeps_the_rules() -> None:
    violations = check(ROOT)
    assert not violations, "\n" + "\n".join(map(str, violations))


def test_the_arrows_point_one_way() -> None:
    rooms = {room: {arrow.split(".")[0] for arrow in arrows} for room, arrows in ARROWS.items()}
    assert set().union(*rooms.values()) <= set(rooms), "an arrow leads to a room that has no entry"
    graphlib.TopologicalSorter(rooms).prepare()  # raises CycleError, naming the circle


def test_no_arrow_is_allowed_that_nothing_needs() -> None:
    assert unused_arrows(ROOT) == []


@pytest.mark.parametrize("module", ["nepa_dist", "nepa_dist.config", "nepa_dist.presets", "nepa_dist.report", "jobs.submit"])
def test_the_command_line_answers_without_loading_torch(module: str) -> None:
    code = f"import sys, {module}; print(' '.join(sorted({{'torch', 'numpy', 'matplotlib'}} & set(sys.modules))))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "", f"import {module} loads {result.stdout.strip()}"


# In pieces, for this file is checked too.
UPWARD = ".." + "/../elsewhere/x.md"
HOME = "/" + "home/someone"

GOOD = {
    "nepa_dist/__init__.py": '__version__ = "1"\n',
    "nepa_dist/config.py": "from nepa_dist import config_base\n",
    "nepa_dist/config_base.py": "import pydantic\n",
    "nepa_dist/presets.py": "from __future__ import annotations\n",
    "nepa_dist/model.py": "import torch\nfrom nepa_dist.config import Config\n",
    "nepa_dist/tasks/__init__.py": "",
    "nepa_dist/tasks/base.py": "from nepa_dist.metrics.collapse import gauge\nfrom nepa_dist.model import Model\n",
    "nepa_dist/tasks/pretrain.py": "from .base import Task\n",
    "nepa_dist/metrics/collapse.py": "import torch\n",
    "nepa_dist/metrics/sinks.py": "",
    "nepa_dist/engines/zero.py": "import deepspeed\n",
    "nepa_dist/train.py": "from nepa_dist import __version__\nfrom nepa_dist.tasks import pretrain\n",
    "jobs/submit.py": "import submitit\nfrom nepa_dist.train import main\n",
    "docs/guide.md": "See [the code](../nepa_dist/train.py), /tmp/x and https://example.org/a/b.\n",
}


def _tree(root: Path, **changed: str) -> Path:
    for name, text in {**GOOD, **changed}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_tree_that_keeps_the_rules_passes(tmp_path: Path) -> None:
    assert check(_tree(tmp_path)) == []


def test_arrows_that_nothing_needs_are_named(tmp_path: Path) -> None:
    unused = unused_arrows(_tree(tmp_path))
    assert {"train -> tasks", "tasks -> metrics.collapse", "model -> config"}.isdisjoint(unused)
    assert {"train -> resume", "tasks -> metrics.spread", "model -> linear"} <= set(unused)


@pytest.mark.parametrize(
    ("file", "text", "line", "rule"),
    [
        (
            "nepa_dist/model.py",
            "import torch\nimport nepa_dist.train\n",
            2,
            "model must not import train; it may import attention, config",
        ),
        ("nepa_dist/model.py", "def f():\n    from nepa_dist import train\n", 2, "model must not import train"),
        ("nepa_dist/tasks/base.py", "from ..engines import zero\n", 1, "tasks must not import engines.zero"),
        ("nepa_dist/tasks/base.py", "from nepa_dist.metrics import sinks\n", 1, "tasks must not import metrics.sinks"),
        ("nepa_dist/presets.py", "from jobs import submit\n", 1, "presets must not import jobs.submit"),
        ("nepa_dist/__init__.py", "import nepa_dist.config\n", 1, "the package itself imports nothing"),
        ("nepa_dist/attic.py", "", 1, "room 'attic' has no entry in ARROWS"),
        ("nepa_dist/train.py", "import deepspeed.ops\n", 1, "deepspeed is imported only in nepa_dist/engines/zero.py"),
        ("nepa_dist/train.py", "import importlib\nimportlib.import_module('deepspeed')\n", 2, "deepspeed is imported only in"),
        ("nepa_dist/metrics/sinks.py", "from prometheus_client import Gauge\n", 1, "prometheus_client is imported only in"),
        ("nepa_dist/train.py", "import submitit\n", 1, "submitit is imported only in jobs/"),
        ("nepa_dist/train.py", "import timm\n", 1, "timm is imported nowhere in this project"),
        ("nepa_dist/train.py", "from pickle import loads\n", 1, "pickle is imported nowhere in this project"),
        ("nepa_dist/model.py", "from torch import distributed as dist\n", 1, "knows nothing of torch.distributed"),
        (
            "nepa_dist/model.py",
            "import torch\ntorch.distributed.get_rank()\n",
            2,
            "knows nothing of torch.distributed",
        ),
        ("nepa_dist/train.py", "import torch\ntorch.load('x', weights_only=False)\n", 2, "unless weights_only=True"),
        ("jobs/submit.py", "import torch\ntorch.load('x')\n", 2, "unless weights_only=True"),
        ("jobs/submit.py", "from torch import load\n", 1, "write torch.load(..., weights_only=True) in full"),
        ("jobs/submit.py", "import numpy as np\nnp.load('x', allow_pickle=True)\n", 2, "where allow_pickle is given"),
        ("nepa_dist/train.py", "x = 1\n" * 400, 400, "fewer than 400 lines"),
        ("docs/guide.md", f"a\nSee {UPWARD}\n", 2, f"a path outside the project: {UPWARD}"),
        ("docs/guide.md", f"a\nlies in {HOME}/x\n", 2, f"a path of one machine: {HOME}/x"),
    ],
)
def test_a_breach_is_named_with_file_line_and_rule(tmp_path: Path, file: str, text: str, line: int, rule: str) -> None:
    violations = check(_tree(tmp_path, **{file: text}))
    assert [(v.file, v.line) for v in violations] == [(file, line)], violations
    assert rule in violations[0].rule
    assert str(violations[0]).startswith(f"{file}:{line}: ")


def test_an_import_for_types_alone_is_free(tmp_path: Path) -> None:
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from nepa_dist.train import main\n"
    assert check(_tree(tmp_path, **{"nepa_dist/presets.py": text})) == []


def test_the_packages_of_the_rules_are_those_that_are_installed() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert all(f'"{package}*"' in text for package in PACKAGES)
