"""Damaged and forged checkpoints: every damage is found and named, the previous checkpoint is taken, no code runs."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nepa_dist.checkpoint.manifest import Manifest
from nepa_dist.checkpoint.portable import FileRecord
from nepa_dist.checkpoint.store import CheckpointError, CheckpointStore


def make_entries(value: float, count: int = 3, numel: int = 64) -> list[tuple[str, dict[str, Tensor]]]:
    """Entries that are filled with one value."""
    return [(f"blocks.{i}.weight", {"weight": torch.full((numel,), value), "step": torch.tensor(value)}) for i in range(count)]


def test_random_bit_flips_are_found_and_the_previous_one_is_taken(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, shard_bytes=2000)
    good = store.save(10, make_entries(1.0, count=6), {"seed": 1})
    newest = store.save(20, make_entries(2.0, count=6), {"seed": 1})
    files = sorted(newest.iterdir())
    assert len(files) > 2
    rng = random.Random(0)
    for trial in range(150):
        file = newest / "manifest.json" if trial % 3 == 0 else rng.choice(files)
        content = file.read_bytes()
        bit = rng.randrange(len(content) * 8)
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        found = store.latest()
        assert found.path == good, f"bit {bit} of {file.name}"
        [(path, reason)] = found.passed_over
        assert path == newest
        assert file.name in reason or "state-" in reason
        file.write_bytes(content)
    assert store.latest().path == newest


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


def link(path: Path) -> None:
    file = path / "state-00001.safetensors"
    shutil.move(file, path.parent / "elsewhere")
    file.symlink_to(path.parent / "elsewhere")


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
        (link, "state-00001.safetensors is a link"),
        (link_all, "step-00000020 is not a folder"),
        (wrong_step, "manifest.json is of step 30"),
        (wrong_format, "manifest.json has format 2"),
        (reformat, "manifest.json does not match its own SHA-256"),
        (not_json, "manifest.json is not JSON"),
        (deep_json, "manifest.json is n"),
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
    """Runs code when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("forge_manifest", [False, True])
def test_a_pickle_in_place_of_a_file_is_never_run(tmp_path: Path, forge_manifest: bool) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    canary = tmp_path / "canary"
    path = store.save(1, make_entries(1.0), {})
    payload = pickle.dumps(Evil(canary))
    (path / "state-00000.safetensors").write_bytes(payload)
    if forge_manifest:
        record = FileRecord("state-00000.safetensors", len(payload), hashlib.sha256(payload).hexdigest())
        rewrite_manifest(path, files=(record,))
    with pytest.raises(CheckpointError, match="not a safetensors file" if forge_manifest else "state-00000.safetensors has"):
        store.open(path)
    assert store.latest().path is None
    assert not canary.exists()


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


def test_the_command_line_shows_and_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nepa_dist.checkpoint.__main__ import main

    store = CheckpointStore(tmp_path / "checkpoints")
    assert main(["verify", str(tmp_path)]) == 2
    for step in (1, 2):
        store.save(step, [("a", {"weight": torch.full((300,), float(step))})], {"world_size": 2})
    assert main(["verify", str(tmp_path)]) == 0
    shard = next(store.path(2).glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    assert main(["inspect", str(tmp_path)]) == 0  # headers and sizes are right
    capsys.readouterr()
    assert main(["verify", str(tmp_path)]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step-00000001  verified")
    assert "on 2 ranks" in first
    assert second.startswith("step-00000002  DAMAGED")
    assert shard.name in second
