"""Official NEPA weights to ours and back.

Official checkpoints are a ``config.json`` and a state dict whose names begin with ``vit_nepa.`` (Hugging Face style, separate
query, key and value). Ours fuse query, key, value into one projection and gate, up into another. Classification checkpoints
carry ``fc_norm`` and ``classifier`` as well.

Reads safetensors; a ``.bin`` file only as plain tensors (``weights_only=True``), so loading never runs code.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nepa_dist.config import FinetuneConfig, ModelConfig
from nepa_dist.heads.classifier import Pool
from nepa_dist.tasks.finetune import FinetuneTask
from nepa_dist.tasks.pretrain import PretrainTask

logger = logging.getLogger(__name__)

OfficialTask = PretrainTask | FinetuneTask


class OfficialFormatError(ValueError):
    """A config or state dict that is not an official NEPA checkpoint, with every problem listed."""


def load_official(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> OfficialTask:
    """Build a task module from official weights.

    Args:
        state_dict: official names to tensors, of pretraining or classification; without the ``vit_nepa.`` prefix when it
            is the bare backbone.
        config: the official ``config.json`` as a dict.

    Returns:
        In evaluation mode: a :class:`PretrainTask`, or a :class:`FinetuneTask` (with ``.logits(images)``) when the state
        dict has a classifier.

    Raises:
        OfficialFormatError: a setting that this project does not have, or keys that are missing, left over or of another
            shape. Missing QK-norm weights are no error: they are ones, and a warning names them.
    """
    state = dict(state_dict)
    if not any(name.startswith("vit_nepa.") for name in state):
        state = {f"vit_nepa.{name}": tensor for name, tensor in state.items()}
    model = model_from_official(config)
    task: OfficialTask
    if "classifier.weight" in state:
        pool: Pool = "mean" if config.get("add_pooling_layer", True) else "last"
        num_classes, causal = len(state["classifier.weight"]), bool(config.get("is_causal", True))
        task = FinetuneTask(model, FinetuneConfig(num_classes=num_classes, pool=pool, causal=causal))
    else:
        task = PretrainTask(model)
    table = _key_table(task)
    _fill_qk_norm(state, table, model.head_dim)
    _check_keys(state, table, task)
    ours = {name: torch.cat([state[source] for source in sources]) for name, sources in table.items()}
    task.load_state_dict(ours, strict=True)
    return task.eval()


def to_official(task: OfficialTask) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The way back: official state dict (fp32, CPU) and ``config.json`` of a task.

    Raises:
        OfficialFormatError: the official format cannot hold this model (learned positions, a mask token).
    """
    model = task.backbone.config
    problems = []
    if not model.rope:
        problems.append("the official model has no learned positions (model.rope is off)")
    if not model.layer_scale:
        problems.append("the official model always has LayerScale (model.layer_scale is off)")
    if "head.mask_token" in task.state_dict():
        problems.append("the official model has no mask token (objective.mask_ratio is above 0)")
    if problems:
        raise OfficialFormatError(_listed("cannot write the official format", problems))
    state = task.state_dict()
    official: dict[str, Tensor] = {}
    for name, targets in _key_table(task).items():
        for target, part in zip(targets, state[name].detach().float().cpu().chunk(len(targets)), strict=True):
            official[target] = part.clone()
    return official, official_config(task)


def read_official(folder: str | Path, *, ema: bool = False) -> OfficialTask:
    """Load an official checkpoint folder: ``config.json`` beside ``model.safetensors`` or a ``.bin`` file.

    Args:
        folder: the checkpoint.
        ema: take ``pytorch_model_ema.bin`` instead of the raw weights.

    Raises:
        OfficialFormatError: a file is missing or the content does not fit.
    """
    folder = Path(folder)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise OfficialFormatError(f"{config_file} is missing: an official checkpoint has its settings there")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OfficialFormatError(f"{config_file} is not JSON: {error}") from None
    names = ["pytorch_model_ema.bin"] if ema else ["model.safetensors", "pytorch_model.bin"]
    for name in names:
        file = folder / name
        if file.is_file():
            return load_official(_read_tensors(file), config)
    raise OfficialFormatError(f"{folder} holds none of: {', '.join(names)}")


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        is_safe = file.suffix == ".safetensors"
        tensors = load_file(file) if is_safe else torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has its own errors, and torch's advises to load unsafely
        raise OfficialFormatError(f"{file} does not hold plain tensors, or is damaged ({type(error).__name__})") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise OfficialFormatError(f"{file} does not hold a dict of tensors")
    return tensors


def write_official(task: OfficialTask, folder: str | Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` that the official code reads."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state, config = to_official(task)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def model_from_official(config: Mapping[str, Any]) -> ModelConfig:
    """Translate an official ``config.json``.

    Raises:
        OfficialFormatError: a required field is missing or a setting is not supported.
    """
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
    try:
        return ModelConfig.model_validate(_translate(config, activation))
    except ValidationError as error:
        fields = [f"{'.'.join(map(str, item['loc']))} {item['msg']}".strip() for item in error.errors()]
        raise OfficialFormatError(_listed("this is no NEPA config that can be loaded", fields)) from None


def _translate(config: Mapping[str, Any], activation: str | None) -> dict[str, Any]:
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


def official_config(task: OfficialTask) -> dict[str, Any]:
    """The official ``config.json`` of a task."""
    model = task.backbone.config
    classifies = isinstance(task, FinetuneTask)
    config: dict[str, Any] = {
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
        "add_pooling_layer": task.head.pool == "mean" if isinstance(task, FinetuneTask) else True,
        "is_causal": task.causal if isinstance(task, FinetuneTask) else task.objective.causal,
        "dtype": "float32",
    }
    if isinstance(task, FinetuneTask):
        config["num_labels"] = len(task.head.linear.weight)
    return config


def _key_table(task: OfficialTask) -> dict[str, list[str]]:
    """Our parameter name to the official ones that it is the concatenation of."""
    model = task.backbone.config
    root = "vit_nepa."
    pairs = {
        "backbone.cls_token": [f"{root}embeddings.cls_token"],
        "backbone.patch_embed": [f"{root}embeddings.patch_embeddings.projection"],
        "backbone.norm": [f"{root}layernorm"],
        "head.norm": ["fc_norm"],
        "head.linear": ["classifier"],
    }
    for i in range(model.depth):
        ours, theirs = f"backbone.blocks.{i}", f"{root}encoder.layer.{i}"
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
    for name in task.state_dict():
        if name in pairs:
            table[name] = pairs[name]
            continue
        module, _, kind = name.rpartition(".")
        if module in pairs:
            table[name] = [f"{source}.{kind}" for source in pairs[module]]
    return table


def _fill_qk_norm(state: dict[str, Tensor], table: Mapping[str, list[str]], head_dim: int) -> None:
    expected = {source for sources in table.values() for source in sources}
    missing = sorted(name for name in expected - set(state) if name.endswith(("q_norm.weight", "k_norm.weight")))
    if missing:
        logger.warning("%d QK-norm weights are not in the state dict and are ones: %s", len(missing), ", ".join(missing))
    state.update({name: torch.ones(head_dim) for name in missing})


def _check_keys(state: Mapping[str, Tensor], table: Mapping[str, list[str]], task: OfficialTask) -> None:
    expected = {source: name for name, sources in table.items() for source in sources}
    problems = [f"missing: {name}" for name in sorted(set(expected) - set(state))]
    problems += [f"left over: {name}" for name in sorted(set(state) - set(expected))]
    shapes = {name: list(tensor.shape) for name, tensor in task.state_dict().items()}
    for source in sorted(set(expected) & set(state)):
        ours = shapes[expected[source]]
        parts = len(table[expected[source]])
        wanted = [ours[0] // parts, *ours[1:]]
        if list(state[source].shape) != wanted:
            problems.append(f"shape of {source}: {list(state[source].shape)}, the config says {wanted}")
    if problems:
        raise OfficialFormatError(_listed("the state dict does not fit the config", problems))


def _listed(what: str, problems: list[str]) -> str:
    return "\n".join([f"{what}:", *(f"  - {problem}" for problem in problems)])
