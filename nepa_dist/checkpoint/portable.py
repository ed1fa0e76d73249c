"""The tensors of a checkpoint: a stream of named entries to and from safetensors files.

An entry is one parameter: its name and up to five tensors, the fields ``weight``, ``exp_avg``, ``exp_avg_sq`` (AdamW's
moments), ``ema`` (moving average of the weight) and ``step`` (AdamW's count of updates, 0-d float32). The names do not depend
on the engine or the world size, so any engine continues what any other saved.

In a file, a tensor's key is ``<field>/<parameter name>``. safetensors is a JSON header and raw bytes: reading it runs no code.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FIELDS = ("weight", "exp_avg", "exp_avg_sq", "ema", "step")
Entries = Iterable[tuple[str, Mapping[str, Tensor]]]
"""Parameter name -> fields, one parameter after the other."""


class CheckpointError(ValueError):
    """A checkpoint cannot be saved, or is not what was saved; the message is fit to print alone."""


class FileRecord(NamedTuple):
    """What a file of a checkpoint must be."""

    name: str
    """Without a folder."""
    bytes: int
    sha256: str
    """Lower-case hex."""


def write_entries(folder: Path, entries: Entries, *, shard_bytes: int) -> list[FileRecord]:
    """Write entries to ``state-00000.safetensors``, ``state-00001.safetensors``, ... and flush each to the disk.

    Each tensor is copied to the CPU as it comes, so the stream may reuse its buffers. Host memory holds one file's tensors
    and, while it is written, their serialized form: at most 2 * shard_bytes.

    Args:
        folder: exists and holds none of these files.
        entries: full (not sharded) tensors of any dtype on any device.
        shard_bytes: largest size of a file; a single larger entry gets a file of its own.

    Returns:
        One record per file. The digest is of the bytes in memory, so a disk that stores other bytes is found when reading.

    Raises:
        ValueError: there are no entries, a name comes twice, or an entry has no or unknown fields or no plain tensor.
        OSError: a file cannot be written.
    """
    records: list[FileRecord] = []
    names: set[str] = set()
    shard: dict[str, Tensor] = {}
    size = 0
    for name, fields in entries:
        _check_entry(name, fields, names)
        cost = sum(tensor.nbytes + _header_bytes(name, tensor) for tensor in fields.values())
        if shard and size + cost > shard_bytes:
            records.append(_write_shard(folder, len(records), shard))
            size = 0
        for field, tensor in fields.items():
            shard[f"{field}/{name}"] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        size += cost
        del fields, tensor  # or the device would hold this entry while the stream makes the next one
    if not shard:
        raise ValueError("there are no entries to write: the engine gave no parameters")
    records.append(_write_shard(folder, len(records), shard))
    return records


class StateReader:
    """Reads the entries of a checkpoint, one parameter at a time.

    Args:
        folder: a verified checkpoint.

    Raises:
        CheckpointError: a file is no safetensors file, or its keys are not ``<field>/<parameter name>``, each once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, dict[str, Any]] = {}
        for path in sorted(folder.glob("state-*.safetensors")):
            try:
                file: Any = safe_open(path, framework="pt", device="cpu")
                keys = list(file.keys())
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
            for key in keys:
                field, _, name = key.partition("/")
                if field not in FIELDS or not name or field in self._files.get(name, {}):
                    raise CheckpointError(f"{path}: key {key!r} is not '<field>/<parameter name>' or comes twice")
                self._files.setdefault(name, {})[field] = file

    def names(self) -> list[str]:
        """Parameter names, sorted."""
        return sorted(self._files)

    def fields(self, name: str) -> list[str]:
        """Fields that are stored for a parameter, in the order of ``FIELDS``.

        Raises:
            CheckpointError: there is no such parameter.
        """
        if name not in self._files:
            raise CheckpointError(f"checkpoint {self.folder} holds no parameter {name!r}")
        return [field for field in FIELDS if field in self._files[name]]

    def read(self, name: str, fields: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Read one parameter.

        Args:
            name: of the parameter.
            fields: which to read; default all that are stored.

        Returns:
            Field -> CPU tensor that owns its memory (it stays valid when the file is deleted).

        Raises:
            CheckpointError: the parameter or a field of it is not stored.
        """
        stored = self.fields(name)
        wanted = stored if fields is None else list(fields)
        if missing := [field for field in wanted if field not in stored]:
            raise CheckpointError(f"checkpoint {self.folder} holds no {missing[0]!r} of parameter {name!r}, only {stored}")
        return {field: self._files[name][field].get_tensor(f"{field}/{name}").clone() for field in wanted}


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file and flush it to the disk.

    Raises:
        OSError: the file exists or cannot be written.
    """
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _write_shard(folder: Path, index: int, shard: dict[str, Tensor]) -> FileRecord:
    """Write the tensors to a file and forget them."""
    data = safetensors.torch.save(shard)
    shard.clear()
    name = f"state-{index:05d}.safetensors"
    write_durably(folder / name, data)
    return FileRecord(name, len(data), hashlib.sha256(data).hexdigest())


def _check_entry(name: str, fields: Mapping[str, Tensor], names: set[str]) -> None:
    if not name or name in names:
        raise ValueError(f"parameter {name!r} comes twice or has no name")
    names.add(name)
    if not fields or not set(fields) <= set(FIELDS):
        raise ValueError(f"parameter {name!r} has the fields {sorted(fields)}; expected some of {list(FIELDS)}")
    for field, tensor in fields.items():
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
            raise ValueError(f"{field} of parameter {name!r} is a {type(tensor).__name__}; a full, dense tensor is needed")


def _header_bytes(name: str, tensor: Tensor) -> int:
    """Upper bound of what a tensor adds to a file's header: JSON key (a character escapes to at most 6), shape, offsets."""
    return 6 * len(name) + 21 * tensor.dim() + 160
