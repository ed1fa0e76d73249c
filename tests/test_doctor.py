"""The doctor: what it measures is plausible, and its advice follows from the numbers."""

import os
from pathlib import Path

import pytest

from images import image_folder
from jobs import doctor as module
from jobs.doctor import Speed, doctor, file_system, images_per_second_per_gpu, main, measure, usable_cores
from nepa_dist.config import ModelConfig
from nepa_dist.cost import train_flops
from nepa_dist.data.containers import DataError
from nepa_dist.data.open import open_container
from nepa_dist.step_time import GPUS

FAST = Speed(2000.0, 0.0, 1.0, 256, 30_000, 0, 1000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "images", size=(64, 48))


def _report(monkeypatch: pytest.MonkeyPatch, folder: Path, speed: Speed, *, cores: int, gpus: int = 1, model: str = "vit_l"):
    monkeypatch.setattr(module, "measure", lambda *_: speed)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    return doctor(str(folder), model_preset=model, gpus=gpus)


def test_a_folder_is_measured(folder: Path) -> None:
    speed = measure(open_container(str(folder), "train", image_size=32), 32, 0.1)
    assert speed.num_samples > 12
    assert (speed.short_side, speed.num_bad) == (48, 0)
    assert min(path.stat().st_size for path in folder.rglob("*.jpg")) <= speed.num_bytes < 10_000
    assert speed.images_per_second > 10
    assert 0 <= speed.wait_share < 1


def test_bad_samples_are_counted_and_only_bad_ones_are_an_error(folder: Path) -> None:
    (folder / "class_0" / "0.jpg").write_text("no image")
    speed = measure(open_container(str(folder), "train", image_size=32), 32, 0.2)
    assert 0 < speed.num_bad < speed.num_samples
    for path in folder.rglob("*.jpg"):
        path.write_text("no image")
    with pytest.raises(DataError, match=r"none of \d+ samples can be used; the first is class_"):
        measure(open_container(str(folder), "train", image_size=32), 32, 0.1)


def test_gpus_ask_for_what_their_operations_allow() -> None:
    model = ModelConfig(preset="vit_b")
    asked = images_per_second_per_gpu("vit_b")
    assert asked * train_flops(model, num_tokens=256) == pytest.approx(module.UTILISATION * GPUS["h100"].peak_bf16)
    assert images_per_second_per_gpu("vit_l") < asked < images_per_second_per_gpu("vit_s")


def test_enough_of_everything_needs_no_advice(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    report = _report(monkeypatch, folder, FAST, cores=16)
    assert report.advice == ()
    assert report.data_wait == 0
    assert "Nothing needs to change" in report.text()


def test_too_few_cores(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    report = _report(monkeypatch, folder, FAST._replace(short_side=375, images_per_second=500), cores=8, gpus=8, model="vit_b")
    assert report.data_wait > 0.9
    assert report.cores_needed > 8 * 8
    assert any(f"--cpus-per-task {report.cores_needed // 8} " in line for line in report.advice)
    assert any("short256" in line for line in report.advice)
    assert all(line in report.text() for line in report.advice)


def test_enough_cores_but_too_few_workers(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    report = _report(monkeypatch, folder, FAST._replace(images_per_second=300), cores=64, model="vit_b")
    needed = -(-1.25 * report.images_per_second_per_gpu // 300)
    assert report.advice == (f"--set data.num_workers={needed:.0f} (now 8 per GPU)",)


def test_slow_storage_and_busy_cores(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    slow = _report(monkeypatch, folder, FAST._replace(read_wait=0.01), cores=16)
    assert "storage is slow" in slow.advice[0]
    assert "data_prep stage" in slow.advice[0]
    busy = _report(monkeypatch, folder, FAST._replace(read_wait=0.01, busy=2.0), cores=16)
    assert "other programs" in busy.advice[0]


def test_the_file_system_is_named(tmp_path: Path) -> None:
    mounts = (
        "22 1 0:20 / / rw - ext4 /dev/sda1 rw\n"
        f"23 22 0:21 / {tmp_path} rw,relatime shared:1 - lustre 10.0.0.1@o2ib:/fs rw\n"
        f"24 22 0:22 / {tmp_path}2 rw - tmpfs none rw\n"
        f"25 22 0:23 / {tmp_path}/with\\040space rw - nfs4 server:/x rw\n"
    )
    assert file_system(tmp_path / "data", mounts) == f"lustre at {tmp_path}"
    assert file_system(tmp_path / "with space" / "x", mounts) == f"nfs4 at {tmp_path}/with space"
    assert file_system(Path("/"), mounts) == "ext4 at /"
    assert " at /" in file_system(tmp_path)
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))


def test_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(folder), "--model", "vit_tiny", "--gpus", "2", "--seconds", "0.1"]) == 0
    out = capsys.readouterr().out
    for part in ("file system", "images/s", "vit_l", "predicted data wait"):
        assert part in out
    assert main(["--data", str(folder / "nothing")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["--data", str(folder), "--gpus", "0"]) == 2
