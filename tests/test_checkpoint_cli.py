"""The commands ``inspect``, ``verify`` and ``convert`` on the checkpoints of a run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nepa_dist.checkpoint.__main__ import main
from nepa_dist.checkpoint.convert import convert
from nepa_dist.checkpoint.store import CheckpointError, CheckpointStore

CONFIG = {"engine": {"name": "fsdp2", "precision": "bf16_autocast"}, "model": {"depth": 2}}


def save(run: Path, step: int, *, ema: bool = True, shard_bytes: int = 1 << 30) -> Path:
    """A checkpoint as a run makes it: weights are ``step``, averages ``step + 0.5``, and 1 / 3 in one place."""
    entries = []
    for name, shape in (("backbone.norm.weight", (8,)), ("head.linear.weight", (10, 8))):
        weight = torch.full(shape, float(step))
        weight.view(-1)[0] = 1 / 3
        fields = {"weight": weight, "exp_avg": weight * 2, "exp_avg_sq": weight * 3, "step": torch.tensor(1001.0)}
        entries.append((name, fields | ({"ema": weight + 0.5} if ema else {})))
    meta: dict[str, Any] = {"state": {"samples_seen": step * 4096}, "config": CONFIG, "config_digest": "abc", "world_size": 4}
    return CheckpointStore(run / "checkpoints", keep_last=9, shard_bytes=shard_bytes).save(step, entries, meta)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def test_inspect_is_a_table_of_facts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 1)
    save(tmp_path, 1000, ema=False)
    assert main(["inspect", str(tmp_path)]) == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["step", "samples", "created", "size", "engine", "ranks", "precision", "parameters", "fields"]
    step, samples, _, size, unit, *rest = first.split()
    assert (step, samples, size, unit) == ("1", "4,096", "0.0", "MB")
    assert rest == ["fsdp2", "4", "bf16_autocast", "88", "weight", "exp_avg", "exp_avg_sq", "ema", "step"]
    assert second.split()[:2] == ["1000", "4,096,000"]
    assert second.split()[-4:] == ["weight", "exp_avg", "exp_avg_sq", "step"]
    assert head.index("fields") == first.index("weight") == second.index("weight")


def test_frozen_parameters_are_counted_and_hide_no_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    learned = {"weight": torch.ones(2), "exp_avg": torch.ones(2), "ema": torch.zeros(2)}
    entries = [("a", learned), ("b", {"weight": torch.ones(3)}), ("c", {"weight": torch.ones(4)})]
    CheckpointStore(tmp_path / "checkpoints").save(5, entries, {})
    assert main(["inspect", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith("  9  weight exp_avg ema; 2 frozen: weight")
    assert main(["convert", str(tmp_path), "--to", str(tmp_path / "new")]) == 0
    _, reader = CheckpointStore.open(tmp_path / "new")
    assert [reader.fields(name) for name in reader.names()] == [["weight", "ema"], ["weight"], ["weight"]]


def test_a_checkpoint_may_be_named_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "run", 10)
    newest = save(tmp_path / "run", 20)
    assert main(["inspect", str(newest)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[0] == "20"
    assert main(["convert", str(newest), "--to", str(tmp_path / "handed-on")]) == 0
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "handed-on")]) == 0
    assert capsys.readouterr().out.startswith("handed-on  verified")
    assert main(["convert", str(tmp_path / "handed-on"), "--to", str(tmp_path / "again"), "--dtype", "bf16"]) == 0
    assert CheckpointStore.open(tmp_path / "again")[0].step == 20
    flip_a_bit(newest / "state-00000.safetensors")
    assert main(["convert", str(newest), "--to", str(tmp_path / "bad")]) == 2
    (newest / "manifest.json").unlink()
    capsys.readouterr()
    assert main(["verify", str(newest)]) == 1
    assert "manifest.json is missing" in capsys.readouterr().out


def test_inspect_names_what_is_missing_and_shows_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / "state-00000.safetensors").unlink()
    CheckpointStore(tmp_path / "checkpoints").save(3, [("a", {"weight": torch.zeros(3)})], {})
    assert main(["inspect", str(tmp_path)]) == 1
    _, first, third, second = capsys.readouterr().out.splitlines()
    assert first.split()[0] == "1"
    assert third.split()[:2] == ["3", "?"], "a fact that the manifest does not give"
    assert second.startswith("step-00000002  DAMAGED")
    assert second.endswith("state-00000.safetensors is missing")


def test_verify_names_each_damaged_file_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 1, shard_bytes=100)
    path = save(tmp_path, 2, shard_bytes=100)
    assert main(["verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "step-00000001  verified  0.0 MB in 2 files"
    flip_a_bit(path / "state-00000.safetensors")
    assert main(["inspect", str(tmp_path)]) == 0, "headers and sizes are right"
    (path / "state-00001.safetensors").write_bytes(b"")
    (path / "state-00002.safetensors").symlink_to(path / "state-00000.safetensors")
    (path / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert main(["verify", str(tmp_path)]) == 1
    intact, damaged, *reasons = capsys.readouterr().out.splitlines()
    assert intact.startswith("step-00000001  verified")
    assert damaged == "step-00000002  DAMAGED"
    found = [reason.strip().removeprefix(f"{path}/") for reason in reasons]
    assert [reason.split(";")[0].split(":")[0] for reason in found] == [
        "notes.txt is not part of the checkpoint",
        "state-00001.safetensors has 0 bytes",
        "state-00002.safetensors is a link or a folder",
        "state-00000.safetensors does not match its SHA-256",
    ]


def test_verify_names_a_damaged_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip_a_bit(save(tmp_path, 1) / "manifest.json")
    assert main(["verify", str(tmp_path)]) == 1
    assert "manifest.json" in capsys.readouterr().out.splitlines()[1]


@pytest.mark.parametrize(
    ("what", "fields"),
    [("weights+ema", ["weight", "ema"]), ("all", ["weight", "exp_avg", "exp_avg_sq", "ema", "step"])],
)
@pytest.mark.parametrize("dtype", [None, "fp32", "bf16"])
def test_convert_to_a_checkpoint(tmp_path: Path, what: str, fields: list[str], dtype: str | None) -> None:
    source = save(tmp_path, 10)
    target = tmp_path / "new"
    options = [] if dtype is None else ["--dtype", dtype]
    assert main(["convert", str(tmp_path), "--to", str(target), "--what", what, "--step", "10", *options]) == 0
    manifest, reader = CheckpointStore.open(target)
    old, old_reader = CheckpointStore.open(source)
    assert manifest.step == 10
    assert manifest.meta.pop("converted")["what"] == what
    assert manifest.meta == old.meta
    assert reader.names() == old_reader.names()
    wanted = torch.bfloat16 if dtype == "bf16" else torch.float32
    for name in reader.names():
        assert reader.fields(name) == fields
        state = old_reader.read(name)
        for field, tensor in reader.read(name).items():
            # 1001 updates have no bf16 form.
            expected = state[field] if field == "step" else state[field].to(wanted)
            assert tensor.dtype == expected.dtype
            assert tensor.equal(expected)


def test_convert_reads_only_what_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 10)
    newest = save(tmp_path, 20)
    flip_a_bit(newest / "state-00000.safetensors")
    new = tmp_path / "new"
    assert main(["convert", str(tmp_path), "--to", str(new), "--step", "20"]) == 2
    assert "does not match its SHA-256" in capsys.readouterr().err
    assert not new.exists()
    assert main(["convert", str(tmp_path), "--to", str(new)]) == 0
    assert "passed over step-00000020" in capsys.readouterr().err
    assert CheckpointStore.open(new)[0].step == 10
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000010")
    assert main(["convert", str(tmp_path), "--to", str(tmp_path / "other")]) == 2
    assert "holds no checkpoint that verifies" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "{tmp}/absent"], "absent is neither a run nor a checkpoint: there is no such folder"),
        (["verify", "{tmp}/empty"], "empty holds no checkpoint"),
        (["verify", "{tmp}/run/checkpoints"], "checkpoints holds no checkpoint; did you mean {tmp}/run?"),
        (["inspect", "{tmp}/file"], "file is neither a run nor a checkpoint: there is no such folder"),
        (["convert", "{tmp}/run/checkpoints/step-00000010", "--to", "{tmp}/new", "--step", "20"], "--step chooses among those"),
        (["convert", "{tmp}/empty", "--to", "{tmp}/new"], "empty holds no checkpoint"),
        (["convert", "{tmp}/run", "--to", "{tmp}/new", "--step", "15"], "run holds no checkpoint of step 15, only of 10, 20"),
        (["convert", "{tmp}/run", "--to", "{tmp}/new"], "step-00000020 holds no 'ema', only"),
        (["convert", "{tmp}/run", "--to", "{tmp}/empty"], "empty exists; name a new folder"),
        (["convert", "{tmp}/run", "--to", "{tmp}/file/new", "--what", "all"], "new cannot be written"),
        (["convert", "{tmp}/run", "--to", "{tmp}/step-00000003", "--what", "all"], "a name for another step than 20"),
    ],
)
def test_a_mistake_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    save(tmp_path / "run", 10)
    save(tmp_path / "run", 20, ema=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    before = sorted(os.listdir(tmp_path))
    assert main([argument.format(tmp=tmp_path) for argument in arguments]) == 2
    output = capsys.readouterr()
    [line] = output.err.splitlines()
    assert message.format(tmp=tmp_path) in line
    assert output.out == ""
    assert sorted(os.listdir(tmp_path)) == before, "nothing is left behind"


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, 10)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for what in ("weights+ema", "all"):
        with pytest.raises(CheckpointError, match=r"new cannot be written: .*No space left"):
            convert(path, tmp_path / "new", what=what)
    assert os.listdir(tmp_path) == ["checkpoints"]
