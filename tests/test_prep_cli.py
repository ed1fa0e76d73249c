"""The command line of data preparation: what it prints, and the exit codes that scripts rely on."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from data_prep.cli import main
from images import image_folder
from nepa_dist.data.prepared import PreparedContainer

ROOT = Path(__file__).parents[1]
FAST = ("--container", "mds", "--policy", "short32", "--workers", "1", "--quiet")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("raw") / "tiny"
    image_folder(root / "train", num_classes=3, per_class=10)
    image_folder(root / "val", num_classes=3, per_class=2, seed=1)
    return root


@pytest.fixture(scope="module")
def original(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "prepared"
    assert run("prepare", source, out, *FAST, "--shards", "3") == 0
    return out


@pytest.fixture
def out(original: Path, tmp_path: Path) -> Path:
    """A prepared data set of its own."""
    shutil.copytree(original, tmp_path / "prepared")
    return tmp_path / "prepared"


@pytest.fixture(autouse=True)
def _no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("SLURM_"):
            monkeypatch.delenv(name)


def run(*words: object) -> int:
    return main([str(word) for word in words])


def damage(path: Path) -> None:
    """Change a byte inside the last image of an MDS shard, which ends with its label."""
    data = bytearray(path.read_bytes())
    data[-20] ^= 255
    path.write_bytes(data)


def test_prepare_goes_all_the_way_and_the_second_time_finds_it_done(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("prepare", source, tmp_path / "out", *FAST, "--shards", 3)
    assert run(*command) == 0
    text = capsys.readouterr().out
    assert "train: 3 shards written, 0 were there; finished" in text
    assert "train: 30 images in 3 shards (mds)" in text
    assert "good (level hash)" in text
    assert PreparedContainer(tmp_path / "out" / "val").read(0).label == 0
    assert run(*command) == 0
    assert "train: 0 shards written, 3 were there; finished" in capsys.readouterr().out


def test_prepare_goes_on_after_damage(source: Path, out: Path, original: Path) -> None:
    (out / "train" / "shard.00001.mds").unlink()
    (out / "train" / "manifest.json").unlink()
    assert run("verify", out, "--level", "quick") == 1
    assert run("prepare", source, out, *FAST, "--shards", "3") == 0
    files = [path.relative_to(original) for path in original.rglob("*") if path.is_file()]
    assert all((out / path).read_bytes() == (original / path).read_bytes() for path in files)


def test_prepare_says_how_a_damaged_shard_is_written_again(
    source: Path, out: Path, original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = out / "train" / "shard.00001.mds"
    damage(shard)
    assert run("prepare", source, out, *FAST, "--shards", "3") == 1
    words = shlex.split(capsys.readouterr().err.strip().splitlines()[-1].partition("again: ")[2])
    assert run(*words[3:], "--workers", 1, "--quiet") == 0
    assert shard.read_bytes() == (original / "train" / shard.name).read_bytes()


def test_files_that_are_no_images_are_counted(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(source, tmp_path / "source")
    for name in ("a.gif", "b.heic"):
        (tmp_path / "source" / "train" / "class_0" / name).write_bytes(b"x")
    (tmp_path / "source" / "train" / "class_0" / "loop.jpg").symlink_to("loop.jpg")
    assert run("prepare", tmp_path / "source", tmp_path / "out", *FAST, "--split", "train", "--shards", "3") == 1
    captured = capsys.readouterr()
    assert "train: 31 images, 2 other files ignored, 3 classes" in captured.out
    assert "class_0/loop.jpg): it cannot be read: Too many levels of symbolic links" in captured.err
    assert "--skip-bad-list" in captured.err


def test_plan_and_write_by_an_array_of_jobs(
    source: Path, original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert run("plan", source, out, *FAST[:4], "--shards", 3) == 0
    assert sorted(path.name for path in (out / "train").iterdir()) == ["plan.json", "plan.npy"]
    assert run("write", source, out, "--workers", 1, "--quiet", "--task-index", 1, "--num-tasks", 2) == 0
    assert "train: 1 shards written, 0 were there; 2 shards are missing, of other tasks" in capsys.readouterr().out
    assert run("info", out) == 0
    assert "not finished" in capsys.readouterr().out
    assert run("verify", out, "--quiet") == 1
    # Slurm counts from where the user says.
    for name, value in {"ID": 4, "MIN": 4, "MAX": 6, "STEP": 2, "COUNT": 2}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert run("write", source, out, "--workers", 1, "--quiet") == 0
    assert "finished" in capsys.readouterr().out
    manifests = [(folder / "train" / "manifest.json").read_bytes() for folder in (out, original)]
    assert manifests[0] == manifests[1]


def test_verify_tells_all_problems_and_writes_a_report(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    assert run("verify", out, "--workers", 1, "--quiet", "--json", report) == 0
    assert json.loads(report.read_text())["good"] is True
    damage(out / "train" / "shard.00000.mds")
    (out / "val" / "shard.00001.mds").unlink()
    capsys.readouterr()
    assert run("verify", out, "--workers", 1, "--quiet", "--json", report) == 1
    captured = capsys.readouterr()
    assert (
        "shard.00000.mds: it is damaged between the samples" in captured.err or "is damaged (CRC-32C differs)" in captured.err
    )
    assert "shard.00001.mds: it is missing" in captured.err
    assert "train: 30 images in 3 shards (mds)" in captured.out
    body = json.loads(report.read_text())
    assert body["good"] is False
    assert [len(split["problems"]) for split in body["splits"]] == [1, 1]


def test_verify_compares_two(out: Path, original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", out, original, "--workers", 1, "--quiet") == 0
    assert "30 same bytes, 0 same pixels, 0 different" in capsys.readouterr().out
    assert run("verify", out / "train", original / "train", "--level", "cross", "--workers", 1, "--quiet") == 0
    assert run("verify", out / "train", original / "val", "--workers", 1, "--quiet") == 1


def test_images_with_masks_keep_their_size_unless_told(tmp_path: Path) -> None:
    image_folder(tmp_path / "images", num_classes=1, per_class=2, size=(400, 300))
    (tmp_path / "images" / "class_0").rename(tmp_path / "images" / "training")
    (tmp_path / "annotations" / "training").mkdir(parents=True)
    for name in ("0.png", "1.png"):
        Image.new("L", (400, 300), 1).save(tmp_path / "annotations" / "training" / name)
    for words, policy, height in (((), "keep", 300), (("--policy", "short256"), "short256-q90", 256)):
        out = tmp_path / policy
        assert run("prepare", tmp_path, out, "--split", "train", *words, "--workers", 1, "--quiet") == 0
        container = PreparedContainer(out / "train")
        assert container.manifest.policy == policy
        mask = container.read(0).mask
        assert mask is not None
        assert len(mask) == height


def test_stage_prints_the_folder_alone(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dest = tmp_path / "node" / "data"
    assert run("stage", out, dest, "--quiet") == 0
    captured = capsys.readouterr()
    assert captured.out == f"{dest}\n"
    assert "val: 7 files copied" in captured.err
    assert run("verify", dest, "--workers", 1, "--quiet", "--level", "decode") == 0
    capsys.readouterr()
    assert run("stage", out / "val", tmp_path / "one", "--quiet", "--json") == 0
    body = json.loads(capsys.readouterr().out)
    assert body["folder"] == str(tmp_path / "one")
    assert body["splits"][0]["copied_files"] == 7
    assert PreparedContainer(tmp_path / "one").manifest.split == "val"


def test_info_tells_what_it_is(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", original) == 0
    text = capsys.readouterr().out
    for part in ("30 images in 3 shards (mds)", "3 with 10 to 10 images", "short32-q90", "repairs    none", "pillow"):
        assert part in text
    assert PreparedContainer(original / "train").fingerprint in text


def test_adopt_indexes_foreign_shards(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "train"
    folder.mkdir()
    for path in (original / "train").glob("*.mds"):
        shutil.copy(path, folder)
    (tmp_path / "names").write_text("a\nb\nc\n")
    assert run("adopt", folder, "--class-names", tmp_path / "names", "--workers", 1, "--quiet") == 0
    assert "30 images in 3 shards (mds)" in capsys.readouterr().out
    assert run("verify", folder, "--workers", 1, "--quiet") == 0
    assert PreparedContainer(folder).class_names == ["a", "b", "c"]


def test_the_printed_command_leaves_out_what_cannot_be_used(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt, out = tmp_path / "spo ilt", tmp_path / "out"
    shutil.copytree(source, spoilt)
    (spoilt / "train" / "class_1" / "4.jpg").write_bytes(b"")
    (spoilt / "train" / "class_2" / "7.jpg").write_bytes(b"\xff\xd8\xff")
    assert run("prepare", spoilt, out, *FAST, "--shards", 3) == 1
    captured = capsys.readouterr()
    assert "class_1/4.jpg): the file is empty" in captured.err
    assert "class_2/7.jpg): " in captured.err
    assert "val: 3 shards written" in captured.out, "the other split is written"
    remove, words = captured.err.strip().splitlines()[-2:]
    assert shlex.split(remove) == ["rm", "-r", str(out / "train")]
    assert shlex.split(words)[:3] == ["python", "-m", "data_prep"]
    shutil.rmtree(out / "train")
    arguments = [*shlex.split(words)[3:], "--workers", "1", "--quiet"]
    too_few = [*arguments, "--max-bad", "1"]
    assert run(*too_few) == 2
    assert "--max-bad 2" in capsys.readouterr().err
    assert arguments[arguments.index("--shards") + 1] == "3"
    assert run(*arguments) == 0
    assert "train: 28 images, 2 left out" in capsys.readouterr().out
    assert run("write", spoilt, out, "--workers", 1, "--quiet") == 0, "the plan remembers what is left out"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("prepare", "nothing-here", "OUT"), "is not a folder"),
        (("prepare", "SOURCE", "OUT", "--policy", "big"), "policy"),
        (("prepare", "SOURCE", "NEW", "--policy", "raw32", "--container", "tar"), "only beton"),
        (("prepare", "SOURCE", "OUT", "--container", "tar"), "another plan"),
        (("prepare", "SOURCE", "SOURCE"), "would become part of it"),
        (("stage", "OUT", "OUT"), "itself; the copy needs another folder"),
        (("write", "SOURCE", "NEW"), "holds no plan"),
        (("write", "SOURCE", "OUT", "--task-index", "1"), "go together"),
        (("write", "SOURCE", "OUT", "--task-index", "2", "--num-tasks", "2"), "no task 2 of 2"),
        (("write", "SOURCE", "OUT", "--workers", "0"), "--workers 0"),
        (("verify", "NEW"), "cannot be read"),
        (("verify", "SOURCE"), "holds no prepared split"),
        (("verify", "OUT", "--level", "cross"), "OTHER"),
        (("stage", "SOURCE", "NEW"), "holds no prepared split"),
        (("adopt", "SOURCE"), "holds no"),
        (("plan", "SOURCE", "NEW", "--skip-bad-list", "nothing-here"), "nothing-here cannot be read"),
    ],
)
def test_mistakes_exit_with_2_and_a_reason(
    words: tuple[str, ...], reason: str, source: Path, original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"SOURCE": source, "OUT": original, "NEW": tmp_path / "new"}
    assert run(*[places.get(word, word) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert reason in error
    assert "Traceback" not in error


def test_an_unknown_option_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run("verify", "x", "--level", "deepest")
    assert caught.value.code == 2
    assert "deepest" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_at_once_and_leaves_nothing_half(tmp_path: Path, number: signal.Signals) -> None:
    images, out = image_folder(tmp_path / "images", num_classes=2, per_class=30, size=(640, 480)), tmp_path / "out"
    command = [sys.executable, "-m", "data_prep", "prepare", str(images), str(out), "--split", "train"]
    command += ["--container", "mds", "--policy", "short400-q100", "--shards", "10", "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True,
        # A shell gives what it starts in the background an ignored SIGINT, and these tests may run there.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    while process.poll() is None and not list(out.glob("train/parts/*.json")):
        time.sleep(0.005)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in error
    assert "Traceback" not in error
    assert not list(out.rglob(".tmp-*"))
    assert list(out.glob("train/parts/*.json")), "what is finished stays"
    assert run(*command[3:-2], "--workers", 1, "--quiet") == 0
