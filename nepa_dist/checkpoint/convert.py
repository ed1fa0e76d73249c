"""A checkpoint to a smaller one: some of its fields, or another dtype. Plain weights are written by :mod:`nepa_dist.export`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from nepa_dist.checkpoint.folder import new_folder, step_of, write_folder
from nepa_dist.checkpoint.portable import FIELDS, CheckpointError, StateReader
from nepa_dist.checkpoint.store import CheckpointStore

What = Literal["weights+ema", "all"]
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

    Args:
        path: the checkpoint's folder; verified before anything is written.
        target: does not exist. It becomes a checkpoint, as :class:`CheckpointStore` verifies and opens it.
        what: ``weights+ema``, without moments and counts; or ``all`` fields.
        dtype: of the new tensors; default: as they are stored. The count of updates (``step``) stays fp32.
        shard_bytes: largest size of a file of the new checkpoint.
        check_digests: False where the digests were checked just before.

    Raises:
        CheckpointError: the checkpoint is damaged or lacks averages, the target exists or cannot be written.
    """
    if os.path.lexists(target):
        raise CheckpointError(f"{target} exists; name a new folder")
    manifest, reader = CheckpointStore.open(path, check_digests=check_digests)
    fields = ["weight", "ema"] if what == "weights+ema" else list(FIELDS)
    if what == "weights+ema" and not any("ema" in reader.fields(name) for name in reader.names()):
        raise CheckpointError(f"{path} holds no 'ema', only {', '.join(reader.common_fields())}")
    if step_of(target.name) not in (None, manifest.step):
        raise CheckpointError(f"{target} is a name for another step than {manifest.step}; name the folder otherwise")
    made = {"source": str(path), "what": what, "dtype": "as stored" if dtype is None else str(dtype)}
    try:
        with new_folder(target) as folder:
            meta = manifest.meta | {"converted": made}
            write_folder(folder, manifest.step, _select(reader, fields, dtype), meta, shard_bytes=shard_bytes, copy=False)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from error


def _select(reader: StateReader, fields: list[str], dtype: torch.dtype | None) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for name in reader.names():
        state = reader.read(name, [field for field in reader.fields(name) if field in fields])
        yield name, {field: tensor if field == "step" else tensor.to(dtype or tensor.dtype) for field, tensor in state.items()}
