"""Weights in timm's names give timm's model the same outputs. The real timm is used where it is installed, figures recorded
from it everywhere."""

import json

import pytest
import torch
from safetensors import safe_open
from timm_reference import CLASSIFIER, GOLDEN, MODEL, images, import_timm, lively_task, timm_model

from nepa_dist.config import Config
from nepa_dist.timm_names import TimmError, to_timm


@pytest.fixture
def timm():
    try:
        return import_timm()
    except ImportError as error:
        pytest.skip(f"timm is not installed: {error}")


def agree(ours, theirs):
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)


def test_outputs_equal_those_recorded_from_timm():
    with safe_open(GOLDEN, "pt") as file:
        figures = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        settings = json.loads(file.metadata()["settings"])
    task, config = lively_task(CLASSIFIER)
    task.load_state_dict({name.removeprefix("ours/"): figures[name] for name in figures if name.startswith("ours/")})
    state, written = to_timm(task.state_dict(), config)
    assert written == settings
    recorded = {name.removeprefix("timm/"): figures[name] for name in figures if name.startswith("timm/")}
    assert state.keys() == recorded.keys()
    assert all(state[name].equal(recorded[name]) for name in state)
    with torch.no_grad():
        agree(task.backbone(images(), causal=False).hidden, figures["features"])
        agree(task.backbone(images(), causal=True).hidden, figures["features_causal"])
        agree(task.backbone(images(35, 56), causal=False).hidden, figures["features_35x56"])
        agree(task.logits(images()), figures["logits"])


VARIANTS = [
    {},
    {"qk_norm_affine": True},
    {"qk_norm": False},
    {"layer_scale": False},
    {"qkv_bias": False},
    {"gated_mlp": False, "activation": "gelu"},
    {"norm_eps": 0.1},
    {"mlp_hidden_dim": 77},
    {"embed_dim": 48, "num_heads": 4},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: ", ".join(changes) or "as in the paper")
def test_backbones_of_every_kind_agree_with_timm(timm, changes):
    task, config = lively_task({"model": MODEL | changes})
    state, settings = to_timm(task.state_dict(), config)
    assert settings["is_causal"]
    model = timm_model(settings, state)
    with torch.no_grad():
        for size in ((28, 28), (35, 56)):
            for causal in (False, True):
                features = task.backbone(images(*size), causal=causal, taps=(0,))
                agree(features.hidden, model.forward_features(images(*size), is_causal=causal))
            _, taps = model.forward_intermediates(images(*size), indices=[0], output_fmt="NLC")
            first = task.backbone(images(*size), causal=False, taps=(0,)).taps[0]
            agree(first[:, 1:], taps[0])


def test_a_classifier_agrees_with_timm(timm):
    task, config = lively_task(CLASSIFIER)
    state, settings = to_timm(task.state_dict(), config)
    assert not settings["is_causal"]
    with torch.no_grad():
        agree(task.logits(images()), timm_model(settings, state)(images()))


def test_learned_positions_keep_the_size_of_training(timm):
    task, config = lively_task({"model": MODEL | {"rope": False}})
    state, settings = to_timm(task.state_dict(), config)
    model = timm_model(settings, state)
    with torch.no_grad():
        agree(task.backbone(images(), causal=False).hidden, model.forward_features(images()))
        with pytest.raises(AssertionError, match="doesn't match model"):
            model.forward_features(images(35, 56))


def test_the_mask_token_is_left_out():
    task, config = lively_task({"model": MODEL, "objective": {"mask_ratio": 0.5}})
    assert "head.mask_token" in task.state_dict()
    assert not [name for name in to_timm(task.state_dict(), config)[0] if "mask" in name]


def test_what_timm_cannot_represent_is_refused_with_every_reason():
    config = Config.model_validate(
        {"task": "finetune", "finetune": {"num_classes": 5, "pool": "last"}, "model": MODEL | {"activation": "gelu"}}
    )
    with pytest.raises(TimmError) as caught:
        to_timm({}, config)
    lines = str(caught.value).splitlines()
    assert "this MLP is gated with gelu" in lines[1]
    assert "does not pool the last token" in lines[2]
    for changes in ({"gated_mlp": False}, {"activation": "gelu"}):
        with pytest.raises(TimmError, match="this MLP is"):
            to_timm({}, Config.model_validate({"model": MODEL | changes}))
    segment = Config.model_validate({"task": "segment", "segment": {"num_classes": 5, "taps": [0, 0, 1, 1]}, "model": MODEL})
    with pytest.raises(TimmError, match="no head for task 'segment'"):
        to_timm({}, segment)
