"""The tensors of a checkpoint: a stream of named entries to and from safetensors files.

An entry is one parameter: its name and up to five tensors, the fields ``weight``, ``exp_avg``, ``exp_avg_sq`` (AdamW's
moments), ``ema`` (moving average of the weight) and ``step`` (AdamW's count of updates, 0-d float32). A parameter that a run
keeps frozen has its weight alone. The names do not depend on the engine or the world size, so any engine continues what any
other saved.

In a file, a tensor's key is ``<field>/<parameter name>``. safetensors is a JSON header and raw bytes: reading it runs no code.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

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


def write_entries(folder: Path, entries: Entries, *, shard_bytes: int, copy: bool = True) -> list[FileRecord]:
    """Write entries to ``state-00000.safetensors``, ``state-00001.safetensors``, ... and flush each to the disk.

    Each tensor is copied to the CPU as it comes, so the stream may reuse its buffers. Host memory holds one file's tensors:
    at most shard_bytes.

    Args:
        folder: exists and holds none of these files.
        entries: full (not sharded) tensors of any dtype on any device.
        shard_bytes: largest size of a file; a single larger entry gets a file of its own.
        copy: False spares the copy of what is on the CPU already, where nothing changes it before the call returns.

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
        check_entry(name, fields, names)
        cost = sum(tensor.nbytes + _header_bytes(name, tensor) for tensor in fields.values())
        if shard and size + cost > shard_bytes:
            records.append(_write_shard(folder, len(records), shard))
            size = 0
        for field, tensor in fields.items():
            host = tensor.detach().to("cpu", copy=copy, memory_format=torch.contiguous_format)
            shard[f"{field}/{name}"] = host.contiguous()  # not copied again, but where there was no copy and it has strides
        size += cost
        del fields, tensor, host  # or the device would hold this entry while the stream makes the next one
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

    def frozen(self) -> set[str]:
        """Parameters that are stored with their weight alone where others have more: the run kept them frozen."""
        alone = {name for name, stored in self._files.items() if set(stored) == {"weight"}}
        return alone if len(alone) < len(self._files) else set()

    def common_fields(self) -> list[str]:
        """Fields that are stored for every parameter that was not frozen, in the order of ``FIELDS``."""
        learned = self._files.keys() - self.frozen()
        return [field for field in FIELDS if all(field in self._files[name] for name in learned)]

    def shape(self, name: str, field: str = "weight") -> list[int]:
        """Shape of a tensor; its data is not read.

        Raises:
            CheckpointError: the parameter or its field is not stored.
        """
        shape: list[int] = self._file(name, field).get_slice(f"{field}/{name}").get_shape()
        return shape

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
        wanted = self.fields(name) if fields is None else list(fields)
        files = {field: self._file(name, field) for field in wanted}
        return {field: file.get_tensor(f"{field}/{name}").clone() for field, file in files.items()}

    def _file(self, name: str, field: str) -> Any:
        """The open file that holds a tensor."""
        if field not in (stored := self.fields(name)):
            raise CheckpointError(f"checkpoint {self.folder} holds no {field!r} of parameter {name!r}, only {stored}")
        return self._files[name][field]


class PartialState:
    """A checkpoint's weights, and its averages if wanted, as the state of a run whose optimizer has not done a step.

    Made for :meth:`Engine.load_named_state`: moments are zeros and the count of updates is 0. The average of what was frozen is
    its weight.

    Args:
        reader: the checkpoint.
        mode: where the average of the new run begins: ``weights``, at the weight; ``weights+ema``, at the stored average.
        use_ema: take the stored average as the weight.
        keep_ema: False if the new run keeps no average; ``mode`` then makes no difference.
        frozen: parameters that the new run freezes: their state is the weight alone.

    Raises:
        CheckpointError: a needed field is not stored for every parameter that was not frozen.
        ValueError: the mode is unknown.
    """

    def __init__(
        self,
        reader: StateReader,
        *,
        mode: Literal["weights", "weights+ema"] = "weights",
        use_ema: bool = False,
        keep_ema: bool = True,
        frozen: Collection[str] = (),
    ) -> None:
        if mode not in ("weights", "weights+ema"):
            raise ValueError(f"mode {mode!r} is unknown; expected 'weights' or 'weights+ema'")
        self._reader, self._frozen, self._without_average = reader, frozen, reader.frozen()
        self._weight = "ema" if use_ema else "weight"
        self._ema = ("ema" if mode == "weights+ema" else self._weight) if keep_ema else None
        for field in {self._weight, self._ema} - {None, *reader.common_fields()}:
            learned = [name for name in reader.names() if name not in self._without_average]
            lacking = [name for name in learned if field not in reader.fields(name)]
            raise CheckpointError(
                f"checkpoint {reader.folder} holds no {field!r} of {len(lacking)} of {len(reader.names())} parameters, "
                f"the first is {lacking[0]!r}"
            )

    def names(self) -> list[str]:
        """Parameter names, sorted."""
        return self._reader.names()

    def read(self, name: str) -> dict[str, Tensor]:
        """State of one parameter: CPU tensors that own their memory.

        Raises:
            CheckpointError: there is no such parameter.
        """
        source, average = self._weight, self._ema
        if name in self._without_average:
            source, average = "weight", None if average is None else "weight"
        stored = self._reader.read(name, [source] if average is None else [source, average])
        weight = stored[source]
        if name in self._frozen:
            return {"weight": weight}
        state = {
            "weight": weight,
            "exp_avg": torch.zeros_like(weight),
            "exp_avg_sq": torch.zeros_like(weight),
            "step": torch.zeros((), dtype=torch.float32),
        }
        return state if average is None else state | {"ema": stored[average].clone()}


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
    path = folder / f"state-{index:05d}.safetensors"
    path.touch(exist_ok=False)
    mode = path.stat().st_mode
    try:
        # Not to memory and then to the file: that holds the interpreter's lock, so training would stand still meanwhile.
        safetensors.torch.save_file(shard, path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    path.chmod(mode)  # the library makes a file that only its owner may read, whatever the umask says
    with path.open("rb") as file:
        os.fsync(file.fileno())
        head = file.read(8)
        head += file.read(int.from_bytes(head, "little"))
    digest = hashlib.sha256(head)
    spans = json.loads(head[8:])
    for key in sorted(shard, key=lambda key: spans[key]["data_offsets"]):
        digest.update(shard[key].reshape(-1).view(torch.uint8).numpy().data)
    shard.clear()
    return FileRecord(path.name, path.stat().st_size, digest.hexdigest())


def check_entry(name: str, fields: Mapping[str, Tensor], names: set[str]) -> None:
    """Check that an entry can be written.

    Args:
        name: of the parameter.
        fields: its tensors.
        names: of the parameters that came before; ``name`` is added.

    Raises:
        ValueError: the name is empty or came before, or there are no or unknown fields or a tensor that is not plain.
    """
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
