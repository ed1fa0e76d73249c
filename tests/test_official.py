"""Official checkpoints: folders, bare backbones, and what is refused. Figures are compared in test_golden.py."""

import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from nepa_dist.config import Config
from nepa_dist.official import OfficialFormatError, from_official, official_preprocessor, read_official, to_official
from nepa_dist.tasks.build import build_task

MODEL = {"image_size": 28, "embed_dim": 32, "depth": 2, "num_heads": 2, "qk_norm_affine": True}
CONFIG = Config.model_validate({"model": MODEL, "seed": 5})
CLASSIFIER = {"task": "finetune", "model": MODEL, "finetune": {"num_classes": 7, "pool": "last", "causal": True}}


def state_of(config):
    task = build_task(config)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(0.01)
    return task.state_dict()


@pytest.fixture
def official():
    return to_official(state_of(CONFIG), CONFIG)


def write(folder, official, name="model.safetensors"):
    state, config = official
    (folder / "config.json").write_text(json.dumps(config))
    (save_file if name.endswith("safetensors") else torch.save)(state, folder / name)


def test_a_classifier_goes_out_and_comes_back(tmp_path):
    config = Config.model_validate(CLASSIFIER)
    state = state_of(config)
    write(tmp_path, to_official(state, config))
    again = read_official(tmp_path)
    assert again.config.task == "finetune"
    assert again.config.finetune.pool == "last"
    assert (again.config.causal, again.config.num_classes) == (True, 7)
    assert again.config.model.mlp_hidden_dim_ == 128
    assert again.state.keys() == state.keys()
    assert all(again.state[name].equal(tensor) for name, tensor in state.items())


def test_normalisation_is_that_of_the_preprocessor_file(tmp_path, official):
    write(tmp_path, official)
    assert read_official(tmp_path).config.data.mean == (0.5, 0.5, 0.5)
    data = CONFIG.data.model_copy(update={"mean": (0.1, 0.2, 0.3)})
    written = official_preprocessor(CONFIG.model_copy(update={"data": data}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
    assert read_official(tmp_path).config.data.mean == (0.1, 0.2, 0.3)


def test_bin_file_and_ema_file(tmp_path, official):
    state, config = official
    write(tmp_path, official, "pytorch_model.bin")
    write(tmp_path, ({name: tensor + 1 for name, tensor in state.items()}, config), "pytorch_model_ema.bin")
    raw, ema = read_official(tmp_path), read_official(tmp_path, ema=True)
    torch.testing.assert_close(ema.state["backbone.cls_token"], raw.state["backbone.cls_token"] + 1)
    named = read_official(tmp_path / "pytorch_model_ema.bin")
    assert named.state["backbone.cls_token"].equal(ema.state["backbone.cls_token"])


class Boom:
    def __reduce__(self):
        return (open, ("/nonexistent/executed", "w"))


def test_bin_file_never_runs_code(tmp_path, official):
    write(tmp_path, ({"vit_nepa.embeddings.cls_token": Boom()}, official[1]), "pytorch_model.bin")
    with pytest.raises(OfficialFormatError, match="does not hold plain tensors"):
        read_official(tmp_path)


def test_bare_backbone(official):
    state, config = official
    bare = {name.removeprefix("vit_nepa."): tensor for name, tensor in state.items()}
    ours = from_official(bare, config)
    assert ours.config.task == "pretrain"
    assert ours.state["backbone.cls_token"].equal(state["vit_nepa.embeddings.cls_token"])


def test_missing_qk_norm_weights_are_ones_and_reported(official, caplog):
    state, config = official
    kept = {name: tensor for name, tensor in state.items() if "q_norm" not in name and "k_norm" not in name}
    with caplog.at_level(logging.WARNING):
        ours = from_official(kept, config)
    assert ours.state["backbone.blocks.1.attn.k_norm.weight"].equal(torch.ones(16))
    assert ours.ones == tuple(f"backbone.blocks.{i}.attn.{part}_norm.weight" for i in range(2) for part in "qk")
    assert "4 QK-norm weights" in caplog.text
    assert "vit_nepa.encoder.layer.0-1.attention.attention.k_norm.weight" in caplog.text


def test_all_misfits_are_listed_at_once(official):
    state, config = official
    del state["vit_nepa.layernorm.bias"]
    for i in range(2):
        del state[f"vit_nepa.encoder.layer.{i}.layernorm_after.weight"]
    state["vit_nepa.pooler.weight"] = torch.zeros(2)
    state["vit_nepa.embeddings.cls_token"] = torch.zeros(1, 1, 31)
    with pytest.raises(OfficialFormatError) as caught:
        from_official(state, config)
    assert str(caught.value).splitlines()[1:] == [
        "  - missing: vit_nepa.encoder.layer.0-1.layernorm_after.weight",
        "  - missing: vit_nepa.layernorm.bias",
        "  - left over: vit_nepa.pooler.weight",
        "  - shape of vit_nepa.embeddings.cls_token: [1, 1, 31], the config says [1, 1, 32]",
    ]


def test_config_that_is_not_supported(official):
    state, config = official
    del config["hidden_size"]
    config |= {"hidden_act": "relu", "qk_norm_bias": True}
    with pytest.raises(OfficialFormatError) as caught:
        from_official(state, config)
    for part in ("hidden_size is missing", "hidden_act 'relu'", "qk_norm_bias = True"):
        assert part in str(caught.value)


def test_config_with_a_value_that_is_no_size(official):
    state, config = official
    with pytest.raises(OfficialFormatError, match=r"model\.depth.*greater than 0"):
        from_official(state, config | {"num_hidden_layers": 0})


def test_folder_without_weights(tmp_path, official):
    with pytest.raises(OfficialFormatError, match=r"config\.json is missing"):
        read_official(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(official[1]))
    with pytest.raises(OfficialFormatError, match=r"holds none of: model\.safetensors"):
        read_official(tmp_path)


def test_models_that_the_official_format_cannot_hold():
    config = Config.model_validate({"model": MODEL | {"rope": False, "layer_scale": False}, "objective": {"mask_ratio": 0.5}})
    with pytest.raises(OfficialFormatError) as caught:
        to_official(build_task(config).state_dict(), config)
    for part in ("no learned positions", "always has LayerScale", "no mask token"):
        assert part in str(caught.value)
    segment = Config.model_validate({"task": "segment", "model": MODEL, "segment": {"num_classes": 3, "taps": [0, 0, 1, 1]}})
    with pytest.raises(OfficialFormatError, match="no head for task 'segment'; the backbone alone"):
        to_official({}, segment)
