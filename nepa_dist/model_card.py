"""``README.md`` of exported weights: what they are, how they were made, what they score, how to load them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from nepa_dist import __version__, timm_names
from nepa_dist.config import Config
from nepa_dist.provenance import KINDS, Provenance

_TASKS = {
    "pretrain": "a pretrained backbone",
    "finetune": "a classifier of {classes} classes",
    "segment": "a segmentation model of {classes} classes",
}
_LOCAL: Any = dict.fromkeys(("name", "run_root", "cluster", "checkpoint", "guard", "metrics"), True) | {
    "data": {"source", "cache_dir", "cache_gigabytes", "num_workers", "prefetch_batches", "expected_num_samples"}
}
"""Settings of the place where the weights were trained, not of the recipe."""
_FORMATS = {
    "native": "`model.safetensors` has the parameters' own names; `config.json` is the configuration.",
    "official": "The files are those of the official code (`vit_nepa.*` names, Hugging Face style).",
    "timm": "`model.safetensors` fits timm's `Eva`; `config.json` holds its arguments.",
}


def model_card(
    config: Config, provenance: Provenance, *, made: Config, format: str, num_parameters: int, dtype: str, folder: Path
) -> str:
    """The text, in Markdown.

    Args:
        config: how the weights were trained.
        provenance: where they come from.
        made: what the files hold; another task than trained if the backbone alone was written.
        format: ``native``, ``official`` or ``timm``.
        num_parameters: in the file.
        dtype: of the tensors in the file.
        folder: name of the folder, for the example.
    """
    model = config.model
    title = model.preset or f"width {model.embed_dim}, {model.depth} blocks, {model.num_heads} heads"
    what = _TASKS[made.task].format(classes=made.num_classes)
    alone = "" if made.task == config.task else f" The head of its task ({config.task}) was left out."
    attention = "causal" if config.causal else "every token sees every other"
    facts = {
        "weights": KINDS[provenance.weights] + (" (moving average)" if provenance.weights == "ema" else ""),
        "run": provenance.name,
        "step": provenance.step,
        "images seen": provenance.samples_seen,
        "parameters": f"{num_parameters:,}, {dtype}",
        "image size, patch size": f"{model.image_size}, {model.patch_size} pixels (any size works)",
        "attention in training": attention,
        "normalisation of pixels in [0, 1]": f"mean {list(config.data.mean)}, std {list(config.data.std)}",
        "training data": config.data.source and Path(config.data.source).name,
        "digest of the training data": provenance.data_fingerprint,
        "digest of the configuration": provenance.config_digest,
        "versions": ", ".join(f"{name} {version}" for name, version in sorted((provenance.versions or {}).items())) or None,
    }
    if not model.rope:
        facts["image size, patch size"] = f"{model.image_size}, {model.patch_size} pixels (learned positions)"
    lines = [f"# NEPA vision transformer, {title}", "", f"This is {what}, trained with the task `{config.task}`.{alone}"]
    lines += ["Method: next-embedding prediction, [arXiv 2512.16922](https://arxiv.org/abs/2512.16922).", _FORMATS[format]]
    lines += [f"Written by nepa-dist {__version__}.", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in facts.items()]
    lines += ["", "## Results", "", *_results(provenance)]
    lines += ["", "## Recipe", "", *_recipe(config)]
    lines += ["", "## Use", "", "```python", _usage(made, format, folder), "```"]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return "not recorded"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")


def _results(provenance: Provenance) -> list[str]:
    if not provenance.results:
        return ["None are recorded."]
    rows = [f"| {_cell(what)} | {value:.4f} | {step:,} |" for what, value, step in provenance.results]
    return ["| what | value | step |", "|---|---|---|", *rows]


def _recipe(config: Config) -> list[str]:
    """The settings that differ from the defaults."""
    values = config.model_dump(mode="json", exclude_defaults=True, exclude=_LOCAL)
    text = yaml.safe_dump(values, sort_keys=False).strip()
    return ["Settings that differ from the defaults of nepa-dist:", "", "```yaml", text, "```"]


def _usage(made: Config, format: str, folder: Path) -> str:
    if format == "timm":
        return timm_names.USAGE.format(folder=folder, causal=made.causal)
    lines = [
        "from nepa_dist.trained import load_backbone",
        "",
        f'backbone = load_backbone("{folder}")',
        "features = backbone(backbone.prepare(pixels))  # uint8 pixels [B, H, W, 3]",
        "features.hidden  # [B, 1 + patches, D]",
    ]
    return "\n".join(lines)
