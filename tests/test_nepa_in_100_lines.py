"""The method on one page keeps its promises: it is short, it learns, and no prediction sees what comes after it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FILE = Path(__file__).parent.parent / "docs" / "nepa_in_100_lines.py"


@pytest.fixture(scope="module")
def nepa() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nepa_in_100_lines", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_has_100_lines_and_stands_alone() -> None:
    text = FILE.read_text()
    assert len(text.splitlines()) <= 100
    assert "nepa_dist" not in text


def test_it_learns_to_beat_the_best_constant_guess() -> None:
    result = subprocess.run([sys.executable, FILE, "100"], capture_output=True, text=True, check=True)
    lines = [line.split() for line in result.stdout.splitlines()]
    first, last = ({"loss": float(line[3]), "skill": float(line[5])} for line in (lines[0], lines[-1]))
    assert last["loss"] < first["loss"] - 0.5
    assert first["skill"] < 0 < 0.3 < last["skill"] < 1


def test_a_patch_changes_no_earlier_prediction(nepa: ModuleType) -> None:
    torch.manual_seed(0)
    model = nepa.Nepa()
    for name, parameter in model.named_parameters():
        if "scale" in name:
            torch.nn.init.ones_(parameter)  # so that attention counts from the start
    images = torch.rand(1, 1, 8, 8)
    changed = images.clone()
    changed[:, :, 2:4, 4:6] += 1.0  # patch 6 of 16, token 7
    with torch.no_grad():
        before, after = model(images)[1], model(changed)[1]
    differs = (before - after).abs().amax(dim=(0, 2)) > 1e-6
    assert differs.tolist() == [False] * 7 + [True] * 10


def test_the_target_gives_no_gradient_but_the_input_does(nepa: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = []
    original = torch.nn.functional.cosine_similarity

    def spy(guess: torch.Tensor, truth: torch.Tensor, dim: int) -> torch.Tensor:
        targets.append(truth.requires_grad)
        assert guess.requires_grad
        return original(guess, truth, dim=dim)

    monkeypatch.setattr(nepa.F, "cosine_similarity", spy)
    nepa.train(steps=2, batch=4)
    assert targets == [False, False]
