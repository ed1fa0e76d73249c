"""Official checkpoints: folders, bare backbones, and what is refused. Figures are compared in test_golden.py."""

import json
import logging

import pytest
import torch

from nepa_dist.config import FinetuneConfig, ModelConfig, ObjectiveConfig
from nepa_dist.export import OfficialFormatError, load_official, read_official, to_official, write_official
from nepa_dist.tasks.finetune import FinetuneTask
from nepa_dist.tasks.pretrain import PretrainTask

MODEL = ModelConfig(image_size=28, embed_dim=32, depth=2, num_heads=2, qk_norm_affine=True)
IMAGES = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def official():
    return to_official(PretrainTask(MODEL, seed=5))


def test_folder_round_trip(tmp_path):
    task = FinetuneTask(MODEL, FinetuneConfig(num_classes=7, pool="last", causal=True), seed=5).eval()
    torch.nn.init.normal_(task.head.linear.weight)
    write_official(task, tmp_path / "out")
    again = read_official(tmp_path / "out")
    assert isinstance(again, FinetuneTask)
    assert again.backbone.config.mlp_hidden_dim_ == 128
    assert torch.equal(again.logits(IMAGES), task.logits(IMAGES))


def test_bin_file_and_ema_file(tmp_path, official):
    state, config = official
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(state, tmp_path / "pytorch_model.bin")
    torch.save({name: tensor + 1 for name, tensor in state.items()}, tmp_path / "pytorch_model_ema.bin")
    raw, ema = read_official(tmp_path), read_official(tmp_path, ema=True)
    torch.testing.assert_close(ema.backbone.cls_token, raw.backbone.cls_token + 1)


class Boom:
    def __reduce__(self):
        return (open, ("/nonexistent/executed", "w"))


def test_bin_file_never_runs_code(tmp_path, official):
    (tmp_path / "config.json").write_text(json.dumps(official[1]))
    torch.save({"vit_nepa.embeddings.cls_token": Boom()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(OfficialFormatError, match="does not hold plain tensors"):
        read_official(tmp_path)


def test_bare_backbone(official):
    state, config = official
    bare = {name.removeprefix("vit_nepa."): tensor for name, tensor in state.items()}
    assert torch.equal(load_official(bare, config).backbone.cls_token, state["vit_nepa.embeddings.cls_token"])


def test_missing_qk_norm_weights_are_ones_and_reported(official, caplog):
    state, config = official
    kept = {name: tensor for name, tensor in state.items() if "q_norm" not in name and "k_norm" not in name}
    with caplog.at_level(logging.WARNING):
        task = load_official(kept, config)
    assert torch.equal(task.backbone.blocks[1].attn.k_norm.weight, torch.ones(16))
    assert "4 QK-norm weights" in caplog.text
    assert "vit_nepa.encoder.layer.1.attention.attention.k_norm.weight" in caplog.text


def test_all_misfits_are_listed_at_once(official):
    state, config = official
    del state["vit_nepa.layernorm.bias"]
    state["vit_nepa.pooler.weight"] = torch.zeros(2)
    state["vit_nepa.embeddings.cls_token"] = torch.zeros(1, 1, 31)
    with pytest.raises(OfficialFormatError) as caught:
        load_official(state, config)
    message = str(caught.value)
    assert "missing: vit_nepa.layernorm.bias" in message
    assert "left over: vit_nepa.pooler.weight" in message
    assert "shape of vit_nepa.embeddings.cls_token: [1, 1, 31], the config says [1, 1, 32]" in message


def test_config_that_is_not_supported(official):
    state, config = official
    del config["hidden_size"]
    config |= {"hidden_act": "relu", "qk_norm_bias": True}
    with pytest.raises(OfficialFormatError) as caught:
        load_official(state, config)
    for part in ("hidden_size is missing", "hidden_act 'relu'", "qk_norm_bias = True"):
        assert part in str(caught.value)


def test_folder_without_weights(tmp_path, official):
    with pytest.raises(OfficialFormatError, match=r"config\.json is missing"):
        read_official(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(official[1]))
    with pytest.raises(OfficialFormatError, match=r"holds none of: model\.safetensors"):
        read_official(tmp_path)


def test_models_that_the_official_format_cannot_hold():
    task = PretrainTask(MODEL.model_copy(update={"rope": False}), ObjectiveConfig(mask_ratio=0.5))
    with pytest.raises(OfficialFormatError) as caught:
        to_official(task)
    assert "learned positions" in str(caught.value)
    assert "mask token" in str(caught.value)
