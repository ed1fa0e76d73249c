"""Official NEPA weights to ours and back.

Official checkpoints are a ``config.json`` and a state dict whose names begin with ``vit_nepa.`` (Hugging Face style, separate
query, key and value). Ours fuse query, key, value into one projection and gate, up into another. Classification checkpoints
carry ``fc_norm`` and ``classifier`` as well. ``preprocessor_config.json`` says how pixels are normalised.

Reads safetensors; a ``.bin`` file only as plain tensors (``weights_only=True``), so loading never runs code.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from nepa_dist.config import Config
from nepa_dist.model import VisionTransformer
from nepa_dist.names import collapse, misfits

OFFICIAL_EMA = "pytorch_model_ema.bin"
_RAW = ("model.safetensors", "pytorch_model.bin")
_ROOT = "vit_nepa."

_log = logging.getLogger(__name__)


class OfficialFormatError(ValueError):
    """A config or state dict that is not an official NEPA checkpoint, with every problem listed."""


class Official(NamedTuple):
    """Official weights in our words."""

    state: dict[str, Tensor]
    """By our names, CPU."""
    config: Config
    """Task, model and normalisation are theirs; the rest is the defaults."""
    ones: tuple[str, ...] = ()
    """Our names of QK-norm weights that were not there and are ones."""


def from_official(
    state_dict: Mapping[str, Tensor], config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None
) -> Official:
    """Translate official weights.

    Args:
        state_dict: official names to tensors, of pretraining or classification; without the ``vit_nepa.`` prefix when it
            is the bare backbone.
        config: the official ``config.json`` as a dict.
        preprocessor: ``preprocessor_config.json``; default: mean and std 0.5, as published.

    Raises:
        OfficialFormatError: a setting that this project does not have, or keys that are missing, left over or of another
            shape. Missing QK-norm weights are no error: they are ones, and a warning names them.
    """
    state = dict(state_dict)
    if not any(name.startswith(_ROOT) for name in state):
        state = {f"{_ROOT}{name}": tensor for name, tensor in state.items()}
    head = state.get("classifier.weight")
    num_classes = None if head is None else sum(head.shape[:1])
    ours = _config_from_official(config, num_classes, preprocessor or {})
    table = _key_table(ours)
    ones = tuple(name for name in table if name.endswith(("q_norm.weight", "k_norm.weight")) and table[name][0] not in state)
    if ones:
        theirs = collapse(table[name][0] for name in ones)
        _log.warning("%d QK-norm weights are not in the state dict and are ones: %s", len(ones), ", ".join(theirs))
        state.update({table[name][0]: torch.ones(ours.model.head_dim) for name in ones})
    problems = misfits({name: tensor.shape for name, tensor in state.items()}, _official_shapes(ours), by="the config says")
    if problems:
        raise OfficialFormatError(_listed("the state dict does not fit the config", problems))
    return Official({name: torch.cat([state[part] for part in parts]) for name, parts in table.items()}, ours, ones)


def read_official(path: str | Path, *, ema: bool = False) -> Official:
    """Read an official checkpoint: ``config.json`` beside ``model.safetensors`` or a ``.bin`` file.

    Args:
        path: the folder, or one of its files of weights.
        ema: take ``pytorch_model_ema.bin`` of a folder instead of the raw weights.

    Raises:
        OfficialFormatError: a file is missing or the content does not fit.
    """
    path = Path(path)
    folder = path.parent if path.is_file() else path
    config = read_json(folder / "config.json", "an official checkpoint has its settings there")
    preprocessor_file = folder / "preprocessor_config.json"
    preprocessor = read_json(preprocessor_file, "") if preprocessor_file.is_file() else None
    names = (path.name,) if path.is_file() else (OFFICIAL_EMA,) if ema else _RAW
    for name in names:
        if (folder / name).is_file():
            return from_official(_read_tensors(folder / name), config, preprocessor)
    raise OfficialFormatError(f"{folder} holds none of: {', '.join(names)}")


def to_official(state: Mapping[str, Tensor], config: Config) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The way back: official state dict and ``config.json``.

    Args:
        state: by our names.
        config: task and model are used.

    Raises:
        OfficialFormatError: the official format cannot hold this model; every reason is listed.
    """
    problems = []
    if config.task not in ("pretrain", "finetune"):
        problems.append(f"it has no head for task {config.task!r}; the backbone alone can be written")
    if not config.model.rope:
        problems.append("it has no learned positions (model.rope is off)")
    if not config.model.layer_scale:
        problems.append("it always has LayerScale (model.layer_scale is off)")
    if "head.mask_token" in state:
        problems.append("it has no mask token (objective.mask_ratio is above 0); the backbone alone can be written")
    if problems:
        raise OfficialFormatError(_listed("the official format cannot hold this model", problems))
    official: dict[str, Tensor] = {}
    for name, targets in _key_table(config).items():
        for target, part in zip(targets, state[name].detach().cpu().chunk(len(targets)), strict=True):
            official[target] = part.clone()
    return official, official_config(config)


def official_preprocessor(config: Config) -> dict[str, Any]:
    """``preprocessor_config.json``: how the official code makes the input of a picture (released: a squashed square)."""
    side = config.model.image_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.data.mean),
        "image_std": list(config.data.std),
    }


def read_json(file: Path, purpose: str) -> dict[str, Any]:
    """Read a JSON file that holds settings by name.

    Raises:
        OfficialFormatError: it is missing (``purpose`` says what it is for), is no JSON, or holds anything else.
    """
    if not file.is_file():
        raise OfficialFormatError(f"{file} is missing: {purpose}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OfficialFormatError(f"{file} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise OfficialFormatError(f"{file} holds no settings by name")
    return values


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        is_safe = file.suffix == ".safetensors"
        tensors = load_file(file) if is_safe else torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has its own errors, and torch's advises to load unsafely
        raise OfficialFormatError(f"{file} does not hold plain tensors, or is damaged ({type(error).__name__})") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise OfficialFormatError(f"{file} does not hold a dict of tensors")
    return tensors


def _config_from_official(config: Mapping[str, Any], num_classes: int | None, preprocessor: Mapping[str, Any]) -> Config:
    required = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size")
    problems = [f"{field} is missing" for field in required if field not in config]
    activation = {"gelu": "gelu", "silu": "silu", "swish": "silu"}.get(str(config.get("hidden_act", "gelu")))
    if activation is None:
        problems.append(f"hidden_act {config['hidden_act']!r} is not supported (gelu, silu)")
    for field in ("qk_norm_bias", "pos_embed_shift", "pos_embed_jitter", "hidden_dropout_prob", "attention_probs_dropout_prob"):
        if config.get(field):
            problems.append(f"{field} = {config[field]!r} is not supported")
    if problems:
        raise OfficialFormatError(_listed("this is no NEPA config that can be loaded", problems))
    causal = bool(config.get("is_causal", True))
    values: dict[str, Any] = {"model": _model_fields(config, activation), "objective": {"causal": causal}}
    if num_classes is not None:
        pool = "mean" if config.get("add_pooling_layer", True) else "last"
        values |= {"task": "finetune", "finetune": {"num_classes": num_classes, "pool": pool, "causal": causal}}
    values["data"] = {ours: preprocessor[f"image_{ours}"] for ours in ("mean", "std") if f"image_{ours}" in preprocessor}
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        fields = [f"{'.'.join(map(str, item['loc']))} {item['msg']}".strip() for item in error.errors()]
        raise OfficialFormatError(_listed("this is no NEPA config that can be loaded", fields)) from None


def _model_fields(config: Mapping[str, Any], activation: str | None) -> dict[str, Any]:
    """Our names for the official fields; defaults are those of the official configuration class."""
    return {
        "embed_dim": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "mlp_hidden_dim": config["intermediate_size"],
        "image_size": config["image_size"],
        "patch_size": config["patch_size"],
        "in_channels": config.get("num_channels", 3),
        "gated_mlp": bool(config.get("use_gated_mlp", False)),
        "activation": activation,
        "norm_eps": config.get("layer_norm_eps", 1e-12),
        "qkv_bias": config.get("qkv_bias", True),
        "qk_norm": config.get("qk_norm", False),
        "qk_norm_affine": config.get("qk_norm_affine", False),
        "layer_scale_init": config.get("layerscale_value", 1e-5),
        "rope_theta": config.get("rope_theta", 100.0),
        "rope_rescale": config.get("pos_embed_rescale") or 1.0,
        "drop_path": config.get("drop_path_prob", 0.0),
        "init_std": config.get("initializer_range", 0.02),
    }


def official_config(config: Config) -> dict[str, Any]:
    """The official ``config.json`` of a pretraining or classification model."""
    model, classifies = config.model, config.task == "finetune"
    values: dict[str, Any] = {
        "architectures": ["ViTNepaForImageClassification" if classifies else "ViTNepaForPreTraining"],
        "model_type": "vit_nepa",
        "hidden_size": model.embed_dim,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.mlp_hidden_dim_,
        "image_size": model.image_size,
        "patch_size": model.patch_size,
        "num_channels": model.in_channels,
        "use_gated_mlp": model.gated_mlp,
        "hidden_act": model.activation,
        "layer_norm_eps": model.norm_eps,
        "qkv_bias": model.qkv_bias,
        "qk_norm": model.qk_norm,
        "qk_norm_affine": model.qk_norm_affine,
        "qk_norm_bias": False,
        "layerscale_value": model.layer_scale_init,
        "rope_theta": model.rope_theta,
        "pos_embed_rescale": model.rope_rescale if model.rope_rescale > 1 else None,
        "pos_embed_shift": None,
        "pos_embed_jitter": None,
        "drop_path_prob": model.drop_path,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": model.init_std,
        "add_pooling_layer": not classifies or config.finetune.pool == "mean",
        "is_causal": config.causal,
        "dtype": "float32",
    }
    if classifies:
        values["num_labels"] = config.num_classes
    return values


def _shapes(config: Config) -> dict[str, list[int]]:
    """Shapes of the parameters that both formats have, by our names."""
    with torch.device("meta"):
        backbone = VisionTransformer(config.model)
    shapes = {f"backbone.{name}": list(parameter.shape) for name, parameter in backbone.named_parameters()}
    if config.task == "finetune":
        assert config.num_classes is not None
        D, C = config.model.embed_dim, config.num_classes
        if config.finetune.pool == "mean":
            shapes |= {"head.norm.weight": [D], "head.norm.bias": [D]}
        shapes |= {"head.linear.weight": [C, D], "head.linear.bias": [C]}
    return shapes


def _official_shapes(config: Config) -> dict[str, list[int]]:
    """Shapes by official names."""
    table, shapes = _key_table(config), {}
    for name, (first, *rest) in _shapes(config).items():
        shapes.update({part: [first // len(table[name]), *rest] for part in table[name]})
    return shapes


def _key_table(config: Config) -> dict[str, list[str]]:
    """Our parameter name to the official ones that it is the concatenation of."""
    pairs = {
        "backbone.cls_token": [f"{_ROOT}embeddings.cls_token"],
        "backbone.patch_embed": [f"{_ROOT}embeddings.patch_embeddings.projection"],
        "backbone.norm": [f"{_ROOT}layernorm"],
        "head.norm": ["fc_norm"],
        "head.linear": ["classifier"],
    }
    for i in range(config.model.depth):
        ours, theirs = f"backbone.blocks.{i}", f"{_ROOT}encoder.layer.{i}"
        attention = f"{theirs}.attention.attention"
        pairs |= {
            f"{ours}.norm1": [f"{theirs}.layernorm_before"],
            f"{ours}.norm2": [f"{theirs}.layernorm_after"],
            f"{ours}.attn.qkv": [f"{attention}.query", f"{attention}.key", f"{attention}.value"],
            f"{ours}.attn.q_norm": [f"{attention}.q_norm"],
            f"{ours}.attn.k_norm": [f"{attention}.k_norm"],
            f"{ours}.attn.proj": [f"{theirs}.attention.output.dense"],
            f"{ours}.mlp.gate_up": [f"{theirs}.intermediate.gate_proj", f"{theirs}.intermediate.up_proj"],
            f"{ours}.mlp.up": [f"{theirs}.intermediate.up_proj"],
            f"{ours}.mlp.down": [f"{theirs}.output.dense"],
            f"{ours}.ls1.gamma": [f"{theirs}.layer_scale.lambda1"],
            f"{ours}.ls2.gamma": [f"{theirs}.output.layer_scale.lambda1"],
        }
    table = {}
    for name in _shapes(config):
        module, _, kind = name.rpartition(".")
        table[name] = pairs[name] if name in pairs else [f"{part}.{kind}" for part in pairs[module]]
    return table


def _listed(what: str, problems: list[str]) -> str:
    return "\n".join([f"{what}:", *(f"  - {problem}" for problem in problems)])
