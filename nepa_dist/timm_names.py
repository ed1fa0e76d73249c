"""Our weights in the names of timm, for its class ``timm.models.eva.Eva``. timm itself is not needed.

That class has every part that ours has: RoPE on normalised patch centres with an unrotated CLS (``rope_type`` ``dinov3``, half
rotation), QK-norm, SwiGLU, LayerScale, and causal attention by an argument of its forward. Its QK-norm has a bias, which gets
zeros, and always a scale, which gets ones where ours has none. The epsilon of the norms is part of a Python object there and
must be given when the model is built; see :data:`USAGE`.

Checked against timm 1.0.31 in ``tests/test_timm.py``. Versions up to 1.0.26 have no ``qk_norm`` in that class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nepa_dist.config import Config

USAGE = """\
import json
from functools import partial
from pathlib import Path

from safetensors.torch import load_file
from timm.layers import LayerNorm
from timm.models.eva import Eva  # timm 1.0.31

folder = Path("{folder}")
settings = json.loads((folder / "config.json").read_text())
model = Eva(norm_layer=partial(LayerNorm, eps=settings["norm_eps"]), **settings["model_args"])
model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
model.eval()
features = model.forward_features(images, is_causal={causal})  # [B, 1 + patches, D]"""
"""How to load it, with the name of the folder and whether attention is causal to fill in."""

_PARTS = {
    "patch_embed": "patch_embed.proj",
    "ls1.gamma": "gamma_1",
    "ls2.gamma": "gamma_2",
    "mlp.gate_up": "mlp.fc1",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}


class TimmError(ValueError):
    """A model that timm's class cannot represent, with every reason."""


def to_timm(state: Mapping[str, Tensor], config: Config) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Translate weights, and say how to build the model that they are for.

    Args:
        state: by our names. A mask token is left out: it takes part in pretraining alone.
        config: task, model and normalisation are used.

    Returns:
        timm's state dict on the CPU, and the settings: ``model_args`` (keywords of ``Eva``), ``norm_eps`` (of its
        ``norm_layer``), ``is_causal`` (for its forward), ``mean`` and ``std`` of the input.

    Raises:
        TimmError: timm's class cannot represent this model; every reason is listed.
    """
    model = config.model
    problems = []
    if (model.gated_mlp, model.activation) not in ((True, "silu"), (False, "gelu")):
        kind = "gated" if model.gated_mlp else "plain"
        problems.append(f"its gated MLP is SwiGLU and its plain one uses gelu; this MLP is {kind} with {model.activation}")
    if config.task == "finetune" and config.finetune.pool != "mean":
        problems.append("it does not pool the last token (finetune.pool: last); the backbone alone can be written")
    if config.task not in ("pretrain", "finetune"):
        problems.append(f"it has no head for task {config.task!r}; the backbone alone can be written")
    if problems:
        raise TimmError("\n  - ".join(["timm's Eva cannot represent this model:", *problems]))
    named = {_timm_name(name): tensor.detach().cpu() for name, tensor in state.items() if name != "head.mask_token"}
    if model.qk_norm:
        K = model.head_dim
        for name in (f"blocks.{i}.attn.{part}_norm" for i in range(model.depth) for part in "qk"):
            named.setdefault(f"{name}.weight", torch.ones(K))
            named[f"{name}.bias"] = torch.zeros(K)
    return named, _settings(config)


def _timm_name(name: str) -> str:
    if name.startswith("head."):
        return name.replace("head.norm", "fc_norm").replace("head.linear", "head")
    name = name.removeprefix("backbone.")
    for ours, theirs in _PARTS.items():
        if f".{ours}." in f".{name}.":
            return name.replace(ours, theirs)
    return name


def _settings(config: Config) -> dict[str, Any]:
    model, classifies = config.model, config.task == "finetune"
    arguments: dict[str, Any] = {
        "img_size": model.image_size,
        "patch_size": model.patch_size,
        "in_chans": model.in_channels,
        "num_classes": config.num_classes if classifies else 0,
        "global_pool": "avg",
        "embed_dim": model.embed_dim,
        "depth": model.depth,
        "num_heads": model.num_heads,
        "qkv_bias": model.qkv_bias,
        "qk_norm": model.qk_norm,
        # timm cuts width x ratio down to a whole number; half a unit more protects it from rounding.
        "mlp_ratio": (model.mlp_hidden_dim_ + 0.5) / model.embed_dim,
        "swiglu_mlp": model.gated_mlp,
        "attn_type": "rope",  # the other kind has no bias on keys
        "init_values": model.layer_scale_init if model.layer_scale else None,
        "drop_path_rate": model.drop_path,
        "use_abs_pos_emb": not model.rope,
        "use_rot_pos_emb": model.rope,
        # It resizes learned positions in another way than we do: those keep the size of training.
        "dynamic_img_size": model.rope,
        "use_post_transformer_norm": True,
        "use_fc_norm": classifies,
    }
    if model.rope:
        arguments |= {"rope_type": "dinov3", "rope_rotate_half": True, "rope_temperature": model.rope_theta}
        if model.rope_rescale > 1:
            arguments["rope_rescale_coords"] = model.rope_rescale
    return {
        "model": "timm.models.eva.Eva",
        "model_args": arguments,
        "norm_eps": model.norm_eps,
        "is_causal": config.causal,
        "mean": list(config.data.mean),
        "std": list(config.data.std),
    }
