"""A checkpoint of a run to a folder to hand on: plain weights, or a checkpoint with some of its fields."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from nepa_dist.checkpoint.folder import flush_folder, step_of, write_folder
from nepa_dist.checkpoint.manifest import Manifest
from nepa_dist.checkpoint.portable import FIELDS, CheckpointError, StateReader, write_durably
from nepa_dist.checkpoint.store import CheckpointStore

What = Literal["weights", "ema", "weights+ema", "all"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def convert(
    path: Path,
    target: Path,
    *,
    what: What,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 1 << 30,
    check_digests: bool = True,
) -> None:
    """Write a part of a checkpoint to a new folder, in one step: the folder is there whole, or not at all.

    ``weights`` and ``ema`` make ``model.safetensors``, with the parameters' own names, and ``config.json``, the configuration
    of the run. ``weights+ema`` and ``all`` make a checkpoint, as :class:`CheckpointStore` verifies and opens it.

    Args:
        path: the checkpoint's folder; verified before anything is written.
        target: does not exist.
        what: which fields.
        dtype: of the new tensors; default: as they are stored. The count of updates (``step``) stays fp32.
        shard_bytes: largest size of a file of a new checkpoint.
        check_digests: False where the digests were checked just before.

    Raises:
        CheckpointError: the checkpoint is damaged or lacks a field, the target exists or cannot be written.
    """
    if os.path.lexists(target):
        raise CheckpointError(f"{target} exists; name a new folder")
    manifest, reader = CheckpointStore.open(path, check_digests=check_digests)
    fields = {"weights": ["weight"], "ema": ["ema"], "weights+ema": ["weight", "ema"]}.get(what, list(FIELDS))
    _check_fields(reader, fields if what != "all" else [])
    if what in ("weights+ema", "all") and step_of(target.name) not in (None, manifest.step):
        raise CheckpointError(f"{target} is a name for another step than {manifest.step}; name the folder otherwise")
    temp = target.parent / f".tmp-{target.name}-{os.getpid()}"
    try:
        temp.mkdir(parents=True)
        try:
            if what in ("weights", "ema"):
                _write_model(temp, path, manifest, reader, field=fields[0], dtype=dtype)
            else:
                made = {"source": str(path), "what": what, "dtype": "as stored" if dtype is None else str(dtype)}
                meta = manifest.meta | {"converted": made}
                write_folder(temp, manifest.step, _select(reader, fields, dtype), meta, shard_bytes=shard_bytes, copy=False)
            os.rename(temp, target)
        finally:
            shutil.rmtree(temp, ignore_errors=True)
        flush_folder(target.parent)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from error


def _check_fields(reader: StateReader, fields: list[str]) -> None:
    for field in fields:
        if field not in reader.common_fields():
            stored = ", ".join(reader.common_fields())
            raise CheckpointError(f"{reader.folder} holds no {field!r} for every parameter, only {stored}")


def _select(reader: StateReader, fields: list[str], dtype: torch.dtype | None) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for name in reader.names():
        state = reader.read(name, [field for field in reader.fields(name) if field in fields])
        yield name, {field: tensor if field == "step" else tensor.to(dtype or tensor.dtype) for field, tensor in state.items()}


def _write_model(
    folder: Path, path: Path, manifest: Manifest, reader: StateReader, *, field: str, dtype: torch.dtype | None
) -> None:
    config: Any = manifest.meta.get("config")
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} does not hold the configuration of a run: no training run has saved it")
    facts = {
        "format": "pt",
        "content": "weights" if field == "weight" else "moving average of the weights",
        "step": str(manifest.step),
        "config_digest": str(manifest.meta.get("config_digest", "")),
        "source": str(path),
    }
    tensors = {name: state[field] for name, state in _select(reader, [field], dtype)}
    write_durably(folder / "model.safetensors", safetensors.torch.save(tensors, facts))
    write_durably(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    flush_folder(folder)
