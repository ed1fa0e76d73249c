"""Every recipe, ablation and data set of configs/: it works, holds only what it changes, and says where that comes from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import options, submit
from nepa_dist.config_load import load_config

CONFIGS = options.CONFIGS
RECIPES = options.recipe_names("pretrain")
DATA = options.recipe_names("data")
ABLATIONS = options.recipe_names("ablate")


@pytest.fixture(autouse=True)
def _empty_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def described(*args: str) -> None:
    assert submit.main(["pretrain", *args, "--dry-run"]) == 0


def flat(path: Path) -> dict[str, Any]:
    return dict(options.flatten(yaml.safe_load(path.read_text())))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("data", [None, *DATA])
def test_every_recipe_works(recipe: str, data: str | None) -> None:
    described(recipe, *(["--data", data] if data else []))


@pytest.mark.parametrize("path", sorted((CONFIGS / "pretrain").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_holds_only_what_differs_from_the_defaults(path: Path) -> None:
    defaults = dict(options.flatten(load_config().model_dump(mode="json")))
    assert {key: value for key, value in flat(path).items() if defaults[key] == value} == {}


@pytest.mark.parametrize(
    "path", sorted([*(CONFIGS / "pretrain").glob("*"), *(CONFIGS / "ablate").glob("*")]), ids=lambda p: p.stem
)
def test_every_line_of_a_recipe_cites_its_source(path: Path) -> None:
    for line in path.read_text().splitlines():
        if not line.startswith("#") and not line.rstrip().endswith(":"):
            assert re.search(r"# .*\b(paper|official|ours|arXiv)\b|# .*arXiv", line) or "preset: vit_" in line, line


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_a_recipe_by_its_own_keys_only(name: str) -> None:
    task = "finetune" if name.startswith("finetune_") else "pretrain"
    path = CONFIGS / "ablate" / f"{name}.yaml"
    recipe = CONFIGS / task / "vit_b.yaml"
    base = {"task": task}
    before = dict(options.flatten(load_config([recipe], base=base).model_dump(mode="json")))
    after = dict(options.flatten(load_config([recipe, path], base=base).model_dump(mode="json")))
    assert {key: value for key, value in after.items() if before[key] != value} == flat(path)
    assert submit.main([task, "vit_tiny", "--data", "digits", "--config", f"ablate/{name}", "--dry-run"]) == 0


def test_expected_ablations_exist() -> None:
    pretraining = "no_shift no_causal no_stop_grad mask40 mask60 no_rope no_qk_norm no_layer_scale gelu sigreg vicreg plain "
    pretraining += "layer_scale layer_scale_rope"
    finetuning = "finetune_causal finetune_fixed_decay finetune_last_token finetune_patch_embed"
    assert sorted([*pretraining.split(), *finetuning.split()]) == ABLATIONS
