"""The loaders: the same pixels for any number of workers or ranks, bad files named, workers that live and end as told."""

import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from images import batch_digest
from nepa_dist.config import AugmentConfig, Config, DataConfig
from nepa_dist.data.augment import CropTransform, Mask, augment
from nepa_dist.data.containers import Container, DataError, Sample
from nepa_dist.data.decode import decode_image
from nepa_dist.data.device import normalize, to_device
from nepa_dist.data.loader import BadSample, Batch, EvalLoader, TrainLoader, add_digests, default_num_workers
from nepa_dist.data.open import open_container
from nepa_dist.data.order import Order
from nepa_dist.data.whole import WholeImages

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


def test_digests_add_up_to_the_same_for_every_world_size_and_name_what_was_seen(folder: Path) -> None:
    whole = [batch.digest for batch in _train(folder, global_batch_size=8, micro_batch_size=8)]
    assert len(set(whole)) == 6
    assert all(0 <= digest < 2**63 for digest in whole)
    options = {"global_batch_size": 8, "micro_batch_size": 2, "world_size": 2}
    ranks = [[batch.digest for batch in _train(folder, rank=rank, num_workers=rank, **options)] for rank in range(2)]
    assert [add_digests(*(d for rank in ranks for d in rank[2 * step : 2 * step + 2])) for step in range(6)] == whole
    wrapped = torch.tensor(ranks[0][:2] + ranks[1][:2]).sum()  # as an all-reduce adds
    assert int(wrapped) & (2**63 - 1) == whole[0]
    others = [_train(folder, global_batch_size=8, micro_batch_size=8, **other) for other in ({"seed": 12}, {"image_size": 16})]
    assert next(iter(others[0])).digest != whole[0]
    assert next(iter(others[1])).digest != whole[0]
    config = DataConfig(num_workers=0, augment=AugmentConfig(flip=0.4))
    container = open_container(str(folder), "train", image_size=SIZE)
    other = TrainLoader(
        container, config, image_size=SIZE, seed=SEED, global_batch_size=8, micro_batch_size=8, rank=0, world_size=1,
        start_step=0, num_steps=1,
    )  # fmt: skip
    assert next(iter(other)).digest != whole[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_masks_are_cut_like_their_images(workers: int) -> None:
    container = open_container("digits", "train", image_size=SIZE)
    batches = list(_train("digits", masks=True, num_workers=workers))
    position, order = 0, Order(SEED, len(container))
    for batch in batches:
        assert batch.masks is not None
        assert (batch.masks.shape, batch.masks.dtype) == ((4, SIZE, SIZE), torch.uint8)
        for mask in batch.masks:
            sample_id, epoch = order.lookup(position)
            sample = container.read(sample_id)
            keys = {"image_size": SIZE, "seed": SEED, "epoch": epoch, "sample_id": sample_id}
            _, wanted = CropTransform(AugmentConfig())(sample.image, sample.mask, **keys)
            np.testing.assert_array_equal(mask.numpy(), wanted)
            position += 1
    assert next(iter(_train("digits"))).masks is None
    moved = to_device(batches[0], torch.device("cpu"), (0.5,) * 3, (0.5,) * 3)
    assert moved["images"].shape == (4, 3, SIZE, SIZE)


def test_a_sample_without_a_mask_is_bad_where_masks_are_asked_for(folder: Path) -> None:
    container = open_container(str(folder), "train", image_size=SIZE)
    loader = EvalLoader(container, DataConfig(num_workers=0), image_size=SIZE, batch_size=10, masks=True)
    (batch,) = loader
    assert [bad.reason for bad in batch.bad] == ["it has no mask"] * 10
    with pytest.raises(DataError, match="it has no mask"):
        next(iter(_train(folder, masks=True)))


class _Narrow:
    """Scenes whose masks have lost their last column."""

    def __init__(self) -> None:
        self._scenes = open_container("digits", "val", image_size=SIZE)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scenes, name)

    def __len__(self) -> int:
        return len(self._scenes)

    def read(self, index: int) -> Sample:
        sample = self._scenes.read(index)
        assert sample.mask is not None
        return replace(sample, mask=sample.mask[:, :-1])


def test_a_mask_of_another_size_than_its_image_is_named_in_training_and_evaluation() -> None:
    reason = f"the mask has {SIZE - 1}x{SIZE} pixels, the image {SIZE}x{SIZE}"
    scenes = cast(Container, _Narrow())
    data = DataConfig(num_workers=0)
    (batch,) = EvalLoader(scenes, data, image_size=SIZE, batch_size=2, masks=True, indices=range(2))
    config = Config.model_validate(
        {"task": "segment", "model": {"image_size": SIZE, "patch_size": 8}, "data": {"source": "digits"}}
    )
    (whole,) = WholeImages(scenes, config, indices=[3])
    for bad in (*batch.bad, *whole.bad):
        assert bad.reason == reason
        assert bad.name == scenes.name(bad.id)
    assert len(batch.bad) == 2
    assert len(whole.bad) == 1


def _paint(
    pixels: NDArray[np.uint8], mask: Mask | None, *, image_size: int, seed: int, epoch: int, sample_id: int
) -> tuple[NDArray[np.uint8], Mask | None]:
    """A transform that shows its key."""
    image = np.full((image_size, image_size, 3), (seed, epoch, sample_id), np.uint8)
    return image, None if mask is None else np.full((image_size, image_size), 250 + sample_id, np.int64)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_transform_can_be_given(folder: Path, workers: int) -> None:
    position, order = 0, Order(SEED, 10)
    for batch in _train(folder, transform=_paint, num_workers=workers):
        for image in batch.images:
            sample_id, epoch = order.lookup(position)
            assert (image == torch.tensor([SEED, epoch, sample_id])).all()
            position += 1
    container = open_container("digits", "val", image_size=SIZE)
    loader = EvalLoader(
        container,
        DataConfig(num_workers=workers),
        image_size=SIZE,
        batch_size=8,
        masks=True,
        transform=_paint,
        indices=range(8),
    )
    (batch,) = loader
    assert batch.masks is not None
    assert batch.masks[:, 0, 0].tolist() == list(range(250, 256))
    assert {bad.reason for bad in batch.bad} == {
        f"the mask has classes from {c} to {c}; 0 to 255 can be used" for c in (256, 257)
    }


def test_blocks_of_shards_change_the_order_alone(folder: Path) -> None:
    container = open_container(str(folder), "train", image_size=SIZE)
    options: dict[str, Any] = {
        "image_size": SIZE, "seed": SEED, "global_batch_size": 5, "micro_batch_size": 5, "rank": 0, "world_size": 1,
        "start_step": 0, "num_steps": 2, "block_shards": 1,
    }  # fmt: skip
    with pytest.raises(DataError, match="python -m data_prep"):
        TrainLoader(container, DataConfig(num_workers=0), **options)
    container.shards = np.arange(10) // 5  # type: ignore[attr-defined]
    batches = list(TrainLoader(container, DataConfig(num_workers=0), **options))
    assert sorted(sorted(batch.ids.tolist()) for batch in batches) == [list(range(5)), list(range(5, 10))]
