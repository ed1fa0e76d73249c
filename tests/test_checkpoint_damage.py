"""Damaged and forged checkpoints: every damage is found and named, the previous checkpoint is taken, no code runs."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from nepa_dist.checkpoint.__main__ import main
from nepa_dist.checkpoint.folder import list_damage
from nepa_dist.checkpoint.manifest import Manifest
from nepa_dist.checkpoint.portable import FileRecord, StateReader
from nepa_dist.checkpoint.store import CheckpointError, CheckpointStore


def make_entries(value: float, count: int = 3, numel: int = 64) -> list[tuple[str, dict[str, Tensor]]]:
    """Entries that are filled with one value."""
    return [(f"blocks.{i}.weight", {"weight": torch.full((numel,), value), "step": torch.tensor(value)}) for i in range(count)]


def test_200_random_bit_flips_are_found_and_the_previous_one_is_taken(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, shard_bytes=2000)
    good = store.save(10, make_entries(1.0, count=6), {"seed": 1})
    newest = store.save(20, make_entries(2.0, count=6), {"seed": 1})
    files = sorted(newest.iterdir())
    assert len(files) > 2
    rng = random.Random(0)
    for trial in range(200):
        file = newest / "manifest.json" if trial % 3 == 0 else rng.choice(files)
        content = file.read_bytes()
        bit = rng.randrange(len(content) * 8)
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=re.escape(str(file))):
            store.verify(newest)
        found = store.latest()
        assert found.path == good, f"bit {bit} of {file.name}"
        [(path, reason)] = found.passed_over
        assert path == newest
        assert str(file) in reason
        file.write_bytes(content)
    assert store.latest().path == newest


@pytest.mark.parametrize("name", ["manifest.json", "state-00000.safetensors", "state-00002.safetensors"])
def test_a_file_that_ends_early_or_late_is_found(tmp_path: Path, name: str) -> None:
    store = CheckpointStore(tmp_path, shard_bytes=1000)
    good = store.save(10, make_entries(1.0, numel=128), {})
    newest = store.save(20, make_entries(2.0, numel=128), {})
    content = (newest / name).read_bytes()
    pieces = [content[:length] for length in (0, 1, 7, 8, 9, len(content) // 2, len(content) - 1)]
    for piece in [*pieces, content + b"\0", content * 2]:
        (newest / name).write_bytes(piece)
        with pytest.raises(CheckpointError, match=re.escape(str(newest / name))):
            store.verify(newest)
        assert store.latest().path == good, f"{len(piece)} of {len(content)} bytes"


def rewrite_manifest(path: Path, **changes: object) -> None:
    """What someone who knows the format can do: a manifest that fits its own digest."""
    body = json.loads((path / "manifest.json").read_text())
    del body["sha256"]
    files = tuple(FileRecord(**file) for file in body.pop("files"))
    (path / "manifest.json").write_bytes(Manifest(**(body | {"files": files} | changes)).to_bytes())


def remove_file(path: Path) -> None:
    (path / "state-00001.safetensors").unlink()


def remove_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def add_file(path: Path) -> None:
    (path / "state-00009.safetensors").write_bytes(b"")


def truncate(path: Path) -> None:
    file = path / "state-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def swap(path: Path) -> None:
    a, b = path / "state-00000.safetensors", path / "state-00001.safetensors"
    a.rename(path / "c")
    b.rename(a)
    (path / "c").rename(b)


def swap_with_another_step(path: Path) -> None:
    a = path / "state-00001.safetensors"
    b = path.parent / "step-00000010" / a.name
    assert a.stat().st_size == b.stat().st_size
    shutil.copy(b, a)


def link(path: Path) -> None:
    file = path / "state-00001.safetensors"
    shutil.move(file, path.parent / "elsewhere")
    file.symlink_to(path.parent / "elsewhere")


def link_manifest(path: Path) -> None:
    shutil.move(path / "manifest.json", path.parent / "elsewhere")
    (path / "manifest.json").symlink_to(path.parent / "elsewhere")


def link_to_nothing(path: Path) -> None:
    (path / "state-00009.safetensors").symlink_to(path.parent / "absent")


def folder_for_file(path: Path) -> None:
    (path / "state-00001.safetensors").unlink()
    (path / "state-00001.safetensors").mkdir()


def link_all(path: Path) -> None:
    shutil.move(path, path.parent / "elsewhere")
    path.symlink_to(path.parent / "elsewhere")


def wrong_step(path: Path) -> None:
    rewrite_manifest(path, step=30)


def wrong_format(path: Path) -> None:
    rewrite_manifest(path, format=2)


def reformat(path: Path) -> None:
    file = path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text())))


def not_json(path: Path) -> None:
    (path / "manifest.json").write_bytes(b"\x80\x04step")


def deep_json(path: Path) -> None:
    (path / "manifest.json").write_text('{"format": 1, "meta": ' + "[" * 100_000)


def deep_json_that_ends(path: Path) -> None:
    (path / "manifest.json").write_text('{"format": 1, "meta": ' + "[" * 100_000 + "]" * 100_000 + "}")


def forge_file(path: Path, name: str, content: bytes) -> None:
    """Put other bytes in a file, and what they are in the manifest."""
    (path / name).write_bytes(content)
    files = [file._asdict() for file in Manifest.from_bytes((path / "manifest.json").read_bytes()).files]
    new = {"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    rewrite_manifest(path, files=tuple(FileRecord(**(new if file["name"] == name else file)) for file in files))


def deep_header(path: Path) -> None:
    header = b'{"weight/a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    forge_file(path, "state-00001.safetensors", len(header).to_bytes(8, "little") + header)


def endless_header(path: Path) -> None:
    forge_file(path, "state-00001.safetensors", b"\xff" * 8 + b"{}")


def tensor_outside(path: Path) -> None:
    header = b'{"weight/a":{"dtype":"F32","shape":[1000000],"data_offsets":[0,4000000]}}'
    forge_file(path, "state-00001.safetensors", len(header).to_bytes(8, "little") + header + bytes(4))


def other_keys(path: Path) -> None:
    forge_file(path, "state-00001.safetensors", safetensors.torch.save({"weights.a": torch.zeros(1)}))


def name_outside(path: Path) -> None:
    rewrite_manifest(path, files=(FileRecord("../state-00000.safetensors", 1, "0" * 64),))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_file, "state-00001.safetensors is missing"),
        (remove_manifest, "manifest.json is missing"),
        (add_file, "state-00009.safetensors is not part of"),
        (truncate, r"state-00001.safetensors has \d+ bytes; \d+ were saved"),
        (swap, "state-0000[01].safetensors does not match its SHA-256"),
        (swap_with_another_step, "state-00001.safetensors does not match its SHA-256"),
        (link, "state-00001.safetensors is a link"),
        (link_manifest, "manifest.json is a link"),
        (link_to_nothing, "state-00009.safetensors is a link"),
        (folder_for_file, "state-00001.safetensors is a link or a folder"),
        (link_all, "step-00000020 is not a folder"),
        (wrong_step, "manifest.json is of step 30"),
        (wrong_format, "manifest.json has format 2"),
        (reformat, "manifest.json does not match its own SHA-256"),
        (not_json, "manifest.json is not JSON"),
        (deep_json, "manifest.json is n"),
        (deep_json_that_ends, "manifest.json is n"),
        (deep_header, "state-00001.safetensors is not a safetensors file"),
        (endless_header, "state-00001.safetensors is not a safetensors file"),
        (tensor_outside, "state-00001.safetensors is not a safetensors file"),
        (other_keys, "state-00001.safetensors: key 'weights.a'"),
        (name_outside, "manifest.json names the file '../state"),
    ],
)
def test_damage_is_named_and_passed_over(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    store = CheckpointStore(tmp_path, shard_bytes=1000)
    good = store.save(10, make_entries(1.0, numel=128), {})
    newest = store.save(20, make_entries(2.0, numel=128), {})
    damage(newest)
    with pytest.raises(CheckpointError, match=message):
        store.open(newest)
    assert store.latest().path == good


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


def torch_save(canary: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight/a": Evil(canary)}, buffer)
    return buffer.getvalue()


def old_torch_save(canary: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight/a": Evil(canary)}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def plain_pickle(canary: Path) -> bytes:
    return pickle.dumps(Evil(canary))


def text_pickle(canary: Path) -> bytes:
    return pickle.dumps(Evil(canary), protocol=0)


@pytest.mark.parametrize("name", ["manifest.json", "state-00000.safetensors", "state-00001.safetensors"])
@pytest.mark.parametrize("make", [torch_save, old_torch_save, plain_pickle, text_pickle])
@pytest.mark.parametrize("forge", [False, True])
def test_a_pickle_in_place_of_a_file_is_never_run(
    tmp_path: Path, name: str, make: Callable[[Path], bytes], forge: bool
) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", shard_bytes=1000)
    canary = tmp_path / "canary"
    payload = make(canary)
    torch_or_pickle_runs(payload, canary)
    path = store.save(1, make_entries(1.0, numel=128), {"config": {}})
    if forge and name != "manifest.json":
        forge_file(path, name, payload)
    else:
        (path / name).write_bytes(payload)
    for read in (store.verify, store.open, lambda path: store.verify(path, check_digests=False)):
        with pytest.raises(CheckpointError, match=re.escape(str(path / name))):
            read(path)
    if name != "manifest.json":
        with pytest.raises(CheckpointError, match="is not a safetensors file"):
            StateReader(path)
    [damage] = list_damage(path)
    assert str(path / name) in damage
    found = store.latest()
    assert found.path is None
    assert len(found.passed_over) == 1
    for command in (["inspect"], ["verify"], ["convert", "--to", str(tmp_path / "new")]):
        assert main([command[0], str(tmp_path), *command[1:]]) != 0
    assert not canary.exists()


def torch_or_pickle_runs(payload: bytes, canary: Path) -> None:
    """Where it is unpickled, the payload does its harm; or its absence would prove nothing."""
    with contextlib.suppress(RuntimeError, TypeError, AttributeError, ValueError):  # after the harm is done, it is no state
        torch.load(io.BytesIO(payload), weights_only=False)
    assert canary.exists()
    canary.unlink()


def test_digests_can_be_left_out_where_they_were_checked(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    path = store.save(1, make_entries(1.0), {})
    file = path / "state-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    store.open(path, check_digests=False)
    with pytest.raises(CheckpointError, match="SHA-256"):
        store.open(path)
