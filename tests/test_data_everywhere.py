"""The same batches from every container, world size, number of workers and place of resumption."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
from test_train import run

from images import batch_digest, image_folder
from jobs.submit import main as submit
from nepa_dist.config import DataConfig
from nepa_dist.data.containers import DataError, Sample
from nepa_dist.data.loader import EvalLoader, TrainLoader, add_digests
from nepa_dist.data.open import open_container
from nepa_dist.metrics.sinks import read_curve
from splits import planned, prepare, write

CONTAINERS = ("folder", "tar", "mds", "beton")
BATCH, STEPS = 8, 9  # 30 images: an epoch ends within the fourth step
SIZE = 24


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    images = image_folder(root / "folder", num_classes=3, per_class=10)
    for container in CONTAINERS[1:]:
        prepare(images, root / container / "train", container, policy="keep")
    return root


def containers(places):
    return {name: open_container(str(places / name), "train", image_size=SIZE) for name in CONTAINERS}


def stream(container, *, world=1, workers=0, start=0, block_shards=0):
    """Per step: what it shows, whichever rank shows it, and the digest that the log would have."""
    digests = []
    ranks = [
        iter(
            TrainLoader(
                container,
                DataConfig(num_workers=workers),
                image_size=SIZE,
                seed=3,
                global_batch_size=BATCH,
                micro_batch_size=BATCH // 4,
                rank=rank,
                world_size=world,
                start_step=start,
                num_steps=STEPS,
                block_shards=block_shards,
            )
        )
        for rank in range(world)
    ]
    for _ in range(start, STEPS):
        # Micro-batches of all ranks, in the order of the global batch.
        batches = [next(rank) for rank in ranks for _ in range(4 // world)]
        digests.append((tuple(batch_digest(batch) for batch in batches), add_digests(*(batch.digest for batch in batches))))
    for rank in ranks:
        assert next(rank, None) is None  # all ranks have equal numbers of batches
    return digests


@pytest.fixture(scope="module")
def expected(places):
    return stream(containers(places)["folder"])


def test_containers_hold_the_same_samples(places):
    opened = containers(places)
    for index in range(30):
        samples = {name: container.read(index) for name, container in opened.items()}
        assert len({(bytes(sample.image), sample.label) for sample in samples.values()}) == 1
    assert len({container.fingerprint for name, container in opened.items() if name != "folder"}) == 1


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_are_the_same_everywhere(places, expected, name, world, workers):
    assert stream(containers(places)[name], world=world, workers=workers) == expected


def test_resumes_anywhere_with_any_world_size(places, expected):
    rng = random.Random(0)
    opened = containers(places)
    for _ in range(20):
        start, world, name = rng.randrange(STEPS), rng.choice([1, 2, 4]), rng.choice(CONTAINERS)
        assert stream(opened[name], world=world, start=start) == expected[start:]


@pytest.mark.parametrize("name", CONTAINERS[1:])
def test_block_order_depends_on_no_world_size_and_shows_each_image_once(places, name):
    container = containers(places)[name]
    expected = stream(container, block_shards=2)
    assert stream(container, world=4, block_shards=2) == expected
    assert stream(container, world=2, workers=1, start=3, block_shards=2) == expected[3:]
    loader = TrainLoader(
        container,
        DataConfig(num_workers=0),
        image_size=SIZE,
        seed=3,
        global_batch_size=10,
        micro_batch_size=10,
        rank=0,
        world_size=1,
        start_step=0,
        num_steps=6,
        block_shards=2,
    )
    ids = [int(i) for batch in loader for i in batch.ids]
    assert sorted(ids[:30]) == sorted(ids[30:]) == list(range(30))
    # Two of the four shards come first, all of them, then the others.
    assert len(set(container.shards[ids[:14]])) == 2


def test_block_order_needs_shards(places):
    with pytest.raises(DataError, match="shards"):
        stream(containers(places)["folder"], block_shards=2)


@pytest.mark.parametrize("world", [1, 2, 4, 7])
def test_evaluation_shows_each_image_once_over_all_ranks(places, world):
    container = containers(places)["tar"]
    seen = []
    for rank in range(world):
        share = range(rank, len(container), world)
        loader = EvalLoader(container, DataConfig(num_workers=0), image_size=SIZE, batch_size=4, indices=share)
        seen += [int(i) for batch in loader for i in batch.ids]
    assert sorted(seen) == list(range(30))


class Huge:
    """An index of the size of ImageNet-1K over one small image."""

    class_names = ()
    fingerprint, num_ignored = "0" * 64, 0

    def __init__(self):
        self.reads = 0

    def __len__(self):
        return 1_281_167

    def read(self, index):
        self.reads += 1
        return Sample(np.zeros((32, 32, 3), np.uint8), -1)

    def name(self, index):
        return str(index)


def test_resuming_late_in_a_large_set_reads_only_the_first_batch():
    container = Huge()
    loader = TrainLoader(
        container,
        DataConfig(num_workers=0),
        image_size=SIZE,
        seed=0,
        global_batch_size=64,
        micro_batch_size=64,
        rank=0,
        world_size=1,
        start_step=123_456,
        num_steps=200_000,
    )
    next(iter(loader))
    assert container.reads == 64


def logged(run_dir):
    return {row["step"]: row["data_digest"] for row in read_curve(run_dir / "metrics.jsonl")}


def test_the_log_proves_which_images_crops_and_flips_a_run_saw(places, tmp_path):
    settings = ("steps=6", "checkpoint.every=3", "micro_batch_size=2")
    result = run(tmp_path / "mds", places / "mds", *settings)
    assert result.returncode == 0, result.stderr
    expected = logged(tmp_path / "mds")
    assert len(set(expected.values())) == len(expected) == 6
    # Taken up in the middle, in another container, by more ranks and workers.
    others = ["--gpus-per-node", "2", "--init", str(tmp_path / "mds/checkpoints/step-00000003"), "--load", "everything"]
    result = run(tmp_path / "beton", places / "beton", *settings, "data.num_workers=2", options=others)
    assert result.returncode == 0, result.stderr
    assert logged(tmp_path / "beton") == {step: digest for step, digest in expected.items() if step > 3}


def test_prepared_source_is_a_folder_with_splits(places):
    with pytest.raises(DataError, match="no val/"):
        open_container(str(places / "tar"), "val", image_size=SIZE)
    assert Path(places / "tar/train/manifest.json").exists()


def test_training_takes_a_url(places, tmp_path, capsys):
    arguments = ["pretrain", "vit_tiny", "--run-dir", str(tmp_path / "run"), "--dry-run", "--set", "global_batch_size=8"]
    assert submit([*arguments, "--data", f"file://{places}/tar", "--set", f"data.cache_dir={tmp_path}/cache"]) == 0
    assert "training images              30" in capsys.readouterr().out
    assert submit([*arguments, "--data", "memory://nowhere"]) == 2
    assert "memory://nowhere/train" in capsys.readouterr().err


def test_a_split_alone_or_unfinished_is_not_taken_for_a_folder_of_images(places, tmp_path):
    with pytest.raises(DataError, match=f"name the folder that holds it, {places / 'tar'}"):
        open_container(str(places / "tar/train"), "train", image_size=SIZE)
    planned(places / "folder", tmp_path / "begun/train", "tar")
    with pytest.raises(DataError, match="not finished"):
        open_container(str(tmp_path / "begun"), "train", image_size=SIZE)
    os.rename(planned(places / "folder", tmp_path / "other", "tar"), tmp_path / "odd")
    write(tmp_path / "odd", places / "folder")
    with pytest.raises(DataError, match="under another name"):
        open_container(str(tmp_path / "odd"), "train", image_size=SIZE)
