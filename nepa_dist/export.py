"""Weights to hand on: ``python -m nepa_dist.export SOURCE OUT`` writes ``model.safetensors``, ``config.json`` and a model card.

The source is whatever :mod:`nepa_dist.trained` reads: a run, a checkpoint, exported weights, official weights. The format is

- ``native``: our names and the configuration; every tool here reads it,
- ``official``: the names and settings of the official NEPA code,
- ``timm``: a state dict for timm's ``Eva``.

A model that a format cannot hold is refused with every reason.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import safetensors.torch
import torch
from torch import Tensor

from nepa_dist.checkpoint.folder import flush_folder, new_folder
from nepa_dist.checkpoint.portable import CheckpointError, write_durably
from nepa_dist.config import Config, ObjectiveConfig
from nepa_dist.labels import write_labels
from nepa_dist.model_card import model_card
from nepa_dist.official import official_preprocessor, to_official
from nepa_dist.provenance import Provenance
from nepa_dist.timm_names import to_timm
from nepa_dist.trained import WeightsError, load_trained

Format = Literal["native", "official", "timm"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Exported(NamedTuple):
    """What was written."""

    provenance: Provenance
    num_parameters: int
    num_bytes: int


def export(
    source: str | Path,
    out: str | Path,
    *,
    format: Format = "native",
    ema: bool = True,
    backbone_only: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Exported:
    """Write weights to a new folder, in one step: it is there whole, or not at all.

    Args:
        source: see :func:`nepa_dist.trained.read_weights`.
        out: does not exist.
        format: see the module.
        ema: take the averaged weights where there are any.
        backbone_only: leave the head out. What is written is a pretraining model with the attention of the source.
        dtype: of the tensors in the file.

    Raises:
        WeightsError, CheckpointError, OfficialFormatError: the source cannot be read, or the folder cannot be written.
        OfficialFormatError, TimmError: the format cannot hold this model.
    """
    out = Path(out)
    if os.path.lexists(out):
        raise WeightsError(f"{out} exists; name a new folder")
    task, config, provenance, class_names = load_trained(source, ema=ema)
    labels = {} if backbone_only else write_labels(class_names)
    state, made = dict(task.state_dict()), config
    if backbone_only:
        state, made = {name: state[name] for name in state if name.startswith("backbone.")}, _backbone_config(config)
    files: dict[str, Any] = {}
    if format == "native":
        files["config.json"] = made.model_dump(mode="json") | labels
    elif format == "official":
        state, files["config.json"] = to_official(state, made)
        files["config.json"] |= labels
        files["config.json"]["dtype"] = str(dtype).removeprefix("torch.")
        files["preprocessor_config.json"] = official_preprocessor(made)
    else:
        state, files["config.json"] = to_timm(state, made)
    state = {name: tensor.to(dtype).contiguous() for name, tensor in state.items()}
    count = sum(tensor.numel() for tensor in state.values())
    name = str(dtype).removeprefix("torch.")
    card = model_card(config, provenance, made=made, format=format, num_parameters=count, dtype=name, folder=Path(out.name))
    return Exported(provenance, count, _write(out, state, provenance, files, card))


def _backbone_config(config: Config) -> Config:
    """A pretraining model without a head, with the attention of the source; how it was trained is in the model card."""
    return Config(name=config.name, model=config.model, data=config.data, objective=ObjectiveConfig(causal=config.causal))


def _write(out: Path, state: dict[str, Tensor], provenance: Provenance, files: dict[str, Any], card: str) -> int:
    """Write the folder; returns the bytes of the weights."""
    weights = safetensors.torch.save(state, {"format": "pt"} | provenance.to_metadata())
    try:
        with new_folder(out) as folder:
            write_durably(folder / "model.safetensors", weights)
            for name, values in files.items():
                write_durably(folder / name, (json.dumps(values, indent=2) + "\n").encode())
            write_durably(folder / "README.md", card.encode())
            flush_folder(folder)
    except OSError as error:
        raise WeightsError(f"{out} cannot be written: {error}") from error
    return len(weights)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code: 0, or 2 for a mistake, which is named."""
    parser = argparse.ArgumentParser(
        prog="python -m nepa_dist.export", description="Write weights to a new folder, with their settings and a model card."
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="RUN|CHECKPOINT|WEIGHTS",
        help="folder of a run, a checkpoint or weights, or a file of them",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder")
    parser.add_argument("--format", choices=get_args(Format), default="native", help="default: native")
    parser.add_argument("--raw", action="store_true", help="the weights themselves, not their average")
    parser.add_argument("--backbone", action="store_true", help="leave the head out")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="default: fp32")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    try:
        exported = export(
            args.source,
            args.out,
            format=args.format,
            ema=not args.raw,
            backbone_only=args.backbone,
            dtype=DTYPES[args.dtype],
        )
    except (ValueError, CheckpointError) as error:
        print(error, file=sys.stderr)
        return 2
    provenance, count, size = exported
    print(f"{provenance.name}: {provenance.origin}, {count:,} parameters")
    print(f"wrote {args.out} ({args.format}, {args.dtype}, {size / 1e6:,.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
