"""The loaders: the same pixels for any number of workers or ranks, bad files named, workers that live and end as told."""

import io
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from nepa_dist.config import AugmentConfig, DataConfig
from nepa_dist.data.augment import augment
from nepa_dist.data.containers import Container, DataError, Sample, open_container
from nepa_dist.data.decode import decode_image
from nepa_dist.data.device import normalize, to_device
from nepa_dist.data.loader import BadSample, Batch, EvalLoader, TrainLoader, batch_digest, default_num_workers
from nepa_dist.data.order import Order

SEED, SIZE = 11, 32


def _jpeg(value: int, width: int = 40, height: int = 30) -> bytes:
    pixels = np.random.RandomState(value).randint(0, 256, (height, width, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten good images in two classes."""
    for i in range(10):
        path = tmp_path / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(_jpeg(i))
    return tmp_path


@pytest.fixture
def bad_folder(folder: Path) -> Path:
    """The same and four files that cannot be used."""
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")
    (folder / "a" / "cut.jpg").write_bytes(_jpeg(1)[:-500])
    (folder / "a" / "text.jpg").write_text("this is no image")
    (folder / "b" / "empty.png").touch()
    (folder / "b" / "pixel.png").write_bytes(buffer.getvalue())
    return folder


REASONS = {
    "a/cut.jpg": "truncated",
    "a/text.jpg": "not an image",
    "b/empty.png": "empty",
    "b/pixel.png": "1x1 pixels: too small",
}


def _train(source: Path | str, **options: Any) -> TrainLoader:
    workers = options.pop("num_workers", 0)
    settings: dict[str, Any] = {
        "image_size": SIZE, "seed": SEED, "global_batch_size": 4, "micro_batch_size": 4, "rank": 0, "world_size": 1,
        "start_step": 0, "num_steps": 6,
    }  # fmt: skip
    container = open_container(str(source), "train", image_size=SIZE)
    return TrainLoader(container, DataConfig(num_workers=workers), **(settings | options))


def _decode(container: Container, sample_id: int) -> NDArray[np.uint8]:
    data = container.read(sample_id).image
    assert isinstance(data, bytes)
    return decode_image(data)


def _digests(loader: TrainLoader | EvalLoader) -> list[str]:
    return [batch_digest(batch) for batch in loader]


def test_batches_hold_the_order_and_the_augmented_pixels(folder: Path) -> None:
    container = open_container(str(folder), "train", image_size=SIZE)
    order, position = Order(SEED, 10), 0
    batches = list(_train(folder))
    assert len(batches) == 6
    for batch in batches:
        assert (batch.images.shape, batch.images.dtype) == ((4, SIZE, SIZE, 3), torch.uint8)
        assert batch.labels.dtype == batch.ids.dtype == torch.int64
        assert batch.bad == ()
        for row in range(4):
            sample_id, epoch = order.lookup(position)
            sample = container.read(sample_id)
            assert (int(batch.ids[row]), int(batch.labels[row])) == (sample_id, sample.label)
            pixels = _decode(container, sample_id)
            wanted = augment(pixels, AugmentConfig(), image_size=SIZE, seed=SEED, epoch=epoch, sample_id=sample_id)
            np.testing.assert_array_equal(batch.images[row].numpy(), wanted)
            position += 1


@pytest.mark.parametrize("source", ["folder", "digits"])
def test_the_number_of_workers_changes_nothing(source: str, folder: Path) -> None:
    place = folder if source == "folder" else "digits"
    wanted = _digests(_train(place))
    assert len(set(wanted)) == 6
    for workers in (1, 2):
        assert _digests(_train(place, num_workers=workers)) == wanted


@pytest.mark.parametrize(("world_size", "micro"), [(1, 2), (2, 4), (2, 1), (4, 2)])
def test_the_world_size_changes_nothing(folder: Path, world_size: int, micro: int) -> None:
    whole = list(_train(folder, global_batch_size=8, micro_batch_size=8))
    options = {"global_batch_size": 8, "micro_batch_size": micro, "world_size": world_size}
    ranks = [list(_train(folder, rank=rank, **options)) for rank in range(world_size)]
    num_micros = 8 // world_size // micro
    for step, batch in enumerate(whole):
        parts = [part for rank in ranks for part in rank[step * num_micros : (step + 1) * num_micros]]
        for field in ("images", "labels", "ids"):
            assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(batch, field))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_sees_the_rest(folder: Path, workers: int) -> None:
    options = {"global_batch_size": 8, "micro_batch_size": 2, "world_size": 2, "rank": 1}
    whole = _digests(_train(folder, **options))
    assert len(whole) == 12
    assert _digests(_train(folder, start_step=4, num_workers=workers, **options)) == whole[8:]
    assert _digests(_train(folder, start_step=6, **options)) == []


def test_epochs_are_exact_and_pixels_change_between_them(folder: Path) -> None:
    batches = list(_train(folder, num_steps=5))
    ids = torch.cat([batch.ids for batch in batches]).tolist()
    images = torch.cat([batch.images for batch in batches])
    assert sorted(ids[:10]) == sorted(ids[10:]) == list(range(10))
    assert all(not torch.equal(images[ids.index(i)], images[10 + ids[10:].index(i)]) for i in range(10))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_are_replaced_and_named(bad_folder: Path, workers: int) -> None:
    container = open_container(str(bad_folder), "train", image_size=SIZE)
    bad = {i for i in range(len(container)) if container.name(i) in REASONS}
    order, position = Order(SEED, 14), 0
    reported: list[BadSample] = []
    for batch in _train(bad_folder, num_steps=7, num_workers=workers):
        wanted = []
        for row in range(4):
            sample_id, epoch = order.lookup(position)
            attempt = 0
            while sample_id in bad:
                wanted.append(sample_id)
                sample_id, epoch = order.replacement(position, attempt)
                attempt += 1
            assert int(batch.ids[row]) == sample_id
            assert int(batch.labels[row]) == container.read(sample_id).label
            pixels = _decode(container, sample_id)
            shown = augment(pixels, AugmentConfig(), image_size=SIZE, seed=SEED, epoch=epoch, sample_id=sample_id)
            np.testing.assert_array_equal(batch.images[row].numpy(), shown)
            position += 1
        assert [item.id for item in batch.bad] == wanted
        reported += batch.bad
    # Two epochs: each bad file is met at least twice.
    assert {item.id for item in reported} == bad
    assert len(reported) >= 8
    for item in reported:
        assert item.name == container.name(item.id)
        assert REASONS[item.name] in item.reason


def test_a_file_that_vanished_is_a_bad_sample(folder: Path) -> None:
    loader = _train(folder, num_steps=3)
    (folder / "a" / "4.jpg").unlink()
    reported = {item for batch in loader for item in batch.bad}
    assert {(item.name, item.reason) for item in reported} == {("a/4.jpg", "cannot be read: No such file or directory")}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_without_any_good_file_is_an_error_that_can_be_read(tmp_path: Path, workers: int) -> None:
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_text("no image")
    with pytest.raises(DataError) as caught:
        next(iter(_train(tmp_path, num_workers=workers)))
    assert "(JPEG, PNG" in str(caught.value)
    assert "3 substitutes cannot be used" in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_impossible_slices_are_refused_at_once(folder: Path) -> None:
    with pytest.raises(ValueError, match="not a multiple"):
        _train(folder, micro_batch_size=3)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        _train(folder, micro_batch_size=2, world_size=2, rank=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_shows_each_good_sample_once_and_names_the_others(bad_folder: Path, workers: int) -> None:
    container = open_container(str(bad_folder), "train", image_size=SIZE)
    batches = list(EvalLoader(container, DataConfig(num_workers=workers), image_size=SIZE, batch_size=4))
    assert len(batches) == 4
    good = [i for i in range(14) if container.name(i) not in REASONS]
    assert torch.cat([batch.ids for batch in batches]).tolist() == good
    assert {item.name for batch in batches for item in batch.bad} == set(REASONS)
    for batch in batches:
        for image, sample_id in zip(batch.images, batch.ids.tolist(), strict=True):
            pixels = _decode(container, sample_id)
            config = AugmentConfig(crop="center")
            wanted = augment(pixels, config, image_size=SIZE, seed=0, epoch=0, sample_id=sample_id)
            np.testing.assert_array_equal(image.numpy(), wanted)


def test_evaluation_of_a_share_and_of_nothing_good(bad_folder: Path) -> None:
    container = open_container(str(bad_folder), "train", image_size=SIZE)
    config = DataConfig(num_workers=0)
    share = EvalLoader(container, config, image_size=SIZE, batch_size=3, indices=[9, 0, 3, 2])
    assert [batch.ids.tolist() for batch in share] == [[9, 0, 3], [2]]
    names = {container.name(i): i for i in range(14)}
    (batch,) = EvalLoader(container, config, image_size=SIZE, batch_size=3, indices=[names["b/empty.png"]])
    assert batch.images.shape == (0, SIZE, SIZE, 3)
    assert batch.bad == (BadSample(names["b/empty.png"], "b/empty.png", "the file is empty"),)


def test_the_global_random_state_is_left_alone(folder: Path) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    before, legacy = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].copy()
    for workers in (0, 2):
        list(_train(folder, num_workers=workers))
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state(legacy=False)["state"]["key"], legacy)


def test_default_workers_leave_a_core_to_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, ranks, wanted in ((1, 1, 0), (2, 1, 1), (16, 1, 8), (16, 4, 3), (8, 8, 0), (4, 8, 0)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert default_num_workers(ranks) == wanted


def _worker_pids() -> set[int]:
    return {process.pid for process in multiprocessing.active_children() if process.pid}


def test_workers_survive_signals_meant_for_the_trainer(folder: Path) -> None:
    wanted = _digests(_train(folder, num_steps=40))
    loader = _train(folder, num_steps=40, num_workers=2)
    batches = iter(loader)
    seen = [batch_digest(next(batches))]
    workers = _worker_pids()
    assert len(workers) == 2
    for pid in workers:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(pid, number)
    seen += [batch_digest(next(batches)) for _ in range(20)]
    assert _worker_pids() == workers
    seen += [batch_digest(batch) for batch in batches]
    assert seen == wanted


def test_a_signal_while_workers_start_reaches_the_trainer_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, fork = os.getpid(), os.fork
    got: list[int] = []

    def handler(*_: object) -> None:
        if os.getpid() != trainer:
            os._exit(3)  # a worker ran what the trainer had installed for itself
        got.append(1)

    def fork_and_signal() -> int:
        pid = fork()
        os.kill(os.getpid(), signal.SIGTERM)  # in both processes
        return pid

    loader = _train(folder, num_workers=2)
    before = signal.signal(signal.SIGTERM, handler)
    try:
        monkeypatch.setattr(os, "fork", fork_and_signal)
        assert len(_digests(loader)) == 6
        assert got
    finally:
        loader.close()
        signal.signal(signal.SIGTERM, before)


def test_a_killed_worker_is_an_error(folder: Path) -> None:
    loader = _train(folder, num_steps=10_000, num_workers=2)
    batches = iter(loader)
    next(batches)
    os.kill(min(_worker_pids()), signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid \d+\) (was killed by SIGKILL|is killed by signal)"):
        for _ in batches:
            pass
    loader.close()
    assert not _worker_pids()


def test_workers_end_when_the_loader_is_closed_finished_or_restarted(folder: Path) -> None:
    loader = _train(folder, num_workers=2, num_steps=50)
    loader.close()
    batches = iter(loader)
    first = batch_digest(next(batches))
    old = _worker_pids()
    assert batch_digest(next(iter(loader))) == first
    assert len(_worker_pids()) == 2
    assert not _worker_pids() & old
    assert list(batches) == []
    loader.close()
    assert not _worker_pids()
    loader.close()
    assert len(_digests(loader)) == 50
    assert not _worker_pids()


def test_a_process_that_forgets_its_loader_still_ends(folder: Path) -> None:
    code = f"""
        import multiprocessing
        from nepa_dist.config import DataConfig
        from nepa_dist.data.containers import open_container
        from nepa_dist.data.loader import TrainLoader
        container = open_container({str(folder)!r}, "train", image_size=32)
        loader = TrainLoader(container, DataConfig(num_workers=2), image_size=32, seed=1, global_batch_size=4,
                             micro_batch_size=4, rank=0, world_size=1, start_step=0, num_steps=10_000)
        batches = iter(loader)
        next(batches)
        print(*[process.pid for process in multiprocessing.active_children()], flush=True)
        raise SystemExit("something else went wrong")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.strip() == "something else went wrong"
    pids = done.stdout.split()
    assert len(pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


class _Stuck:
    """A container on a file system that does not answer."""

    class_names: list[str]
    fingerprint = ""

    def __init__(self, sign: Path) -> None:
        self.class_names = []
        self._sign = sign

    def __len__(self) -> int:
        return 10

    def read(self, index: int) -> Sample:
        self._sign.touch()
        time.sleep(600)
        raise OSError

    def name(self, index: int) -> str:
        return str(index)


def test_a_worker_that_is_stuck_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # How long torch waits for a worker to end by itself, seconds.
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.3)
    sign = tmp_path / "reading"
    loader = EvalLoader(_Stuck(sign), DataConfig(num_workers=1), image_size=SIZE, batch_size=2)
    iter(loader)
    while not sign.exists() and _worker_pids():
        time.sleep(0.01)
    assert len(_worker_pids()) == 1
    loader.close()
    assert not _worker_pids()


def test_digest_follows_ids_and_pixels() -> None:
    def batch(pixel: int, sample_id: int) -> Batch:
        images = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
        images[1, 2, 3, 0] = pixel
        return Batch(images, torch.zeros(2, dtype=torch.int64), torch.tensor([0, sample_id]), ())

    digests = [batch_digest(batch(*case)) for case in ((0, 1), (1, 1), (0, 2), (0, 1))]
    assert digests[0] == digests[3]
    assert len(set(digests)) == 3


def test_normalize_on_the_device() -> None:
    images = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8)
    mean, std = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)
    out = normalize(images, mean, std)
    assert (out.shape, out.dtype) == ((2, 3, 5, 7), torch.float32)
    assert out.is_contiguous(memory_format=torch.channels_last)
    for channel in range(3):
        wanted = (images[..., channel].double() / 255 - mean[channel]) / std[channel]
        assert (out[:, channel].double() - wanted).abs().max() < 1e-6
    batch = Batch(images, torch.tensor([1, -1]), torch.tensor([8, 9]), ())
    moved = to_device(batch, torch.device("cpu"), mean, std)
    assert set(moved) == {"images", "labels", "ids"}
    assert torch.equal(moved["images"], out)
    assert (moved["labels"].tolist(), moved["ids"].tolist()) == ([1, -1], [8, 9])
