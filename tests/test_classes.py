"""Classes of the two splits: a number must mean the same class in both, or an accuracy means nothing."""

import pytest

from images import image_folder
from nepa_dist.config import Config, ConfigError
from nepa_dist.data.classes import check_validation, other_classes, resolve_classes
from nepa_dist.data.open import open_container
from nepa_dist.online_knn import online_knn_problems
from splits import prepare


@pytest.fixture
def apart(tmp_path):
    """Two splits that were prepared each for itself: the second lacks the first class, so that its numbers are off by one."""
    train, val = (image_folder(tmp_path / "images" / split) for split in ("train", "val"))
    (val / "class_0").rename(tmp_path / "class_0")
    for split, images in (("train", train), ("val", val)):
        prepare(images, tmp_path / "data" / split, shards=1)
    return tmp_path / "data"


def of(data, task):
    return Config.model_validate({"task": task, "data": {"source": str(data)}})


def splits(data):
    return [open_container(str(data), split, image_size=32) for split in ("train", "val")]


def test_splits_whose_numbers_mean_other_classes_are_refused(apart):
    with pytest.raises(ConfigError) as caught:
        check_validation(of(apart, "finetune"), *splits(apart))
    assert "class 0 is 'class_1' in val and 'class_0' in train (2 and 3 classes)" in caught.value.problems[0]
    (problem,) = online_knn_problems(of(apart, "pretrain"))
    assert "class 0 is 'class_1' in val" in problem


def test_a_split_that_lacks_a_class_of_its_folder_is_none_of_these(tmp_path):
    for split in ("train", "val"):
        image_folder(tmp_path / split)
    for file in (tmp_path / "val" / "class_0").iterdir():
        file.unlink()
    (tmp_path / "val" / "class_0").rmdir()
    check_validation(of(tmp_path, "finetune"), *splits(tmp_path))


@pytest.mark.parametrize(("task", "what"), [("finetune", "labels"), ("segment", "masks")])
def test_a_split_that_cannot_be_scored_is_refused(tmp_path, task, what):
    image_folder(tmp_path / "train")
    flat = image_folder(tmp_path / "val")
    for file in list(flat.glob("*/*.jpg")):
        file.rename(flat / f"{file.parent.name}{file.name}")
    for folder in flat.glob("class_*/"):
        folder.rmdir()
    (tmp_path / "data").mkdir()
    prepare(tmp_path / "train", tmp_path / "data" / "train", shards=1)
    prepare(tmp_path / "val", tmp_path / "data" / "val", shards=1)
    with pytest.raises(ConfigError, match=f"the validation split of .* has no {what}"):
        check_validation(of(tmp_path / "data", task), *splits(tmp_path / "data"))


@pytest.mark.parametrize("val", [["a", "b", "c"], ["a", "b"], []])
def test_classes_may_be_missing_at_the_end(val):
    assert other_classes(["a", "b", "c"], val) is None


def test_classes_that_training_does_not_know():
    assert "class 1 is 'b' in val and unknown in train" in other_classes(["a"], ["a", "b"])


def test_masks_that_cannot_fit_the_classes_are_found_before_the_run():
    config = Config.model_validate({"task": "segment", "data": {"source": "digits"}, "segment": {"num_classes": 5}})
    with pytest.raises(ConfigError, match=r"none of its first masks can be used; .* but there are 5 classes"):
        resolve_classes(config, open_container("digits", "train", image_size=64))
