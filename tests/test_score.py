"""``python -m nepa_dist.score WEIGHTS --data DATA``: the numbers against a count by hand, and what is refused."""

import csv
import json

import pytest
import torch
from safetensors.torch import save_file

from images import image_folder
from nepa_dist.config import Config
from nepa_dist.data.device import normalize
from nepa_dist.data.open import open_container
from nepa_dist.score import main
from nepa_dist.tasks.build import build_task
from nepa_dist.trained import load_trained

MODEL = {"image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}


def weights(folder, task, **section):
    """A model whose head is not zero, as a folder of weights."""
    config = Config.model_validate(
        {"task": task, "model": MODEL, task: section, "engine": {"precision": "fp32"}, "data": {"source": "digits"}}
    )
    model = build_task(config)
    for index, tensor in enumerate(model.head.parameters()):
        torch.nn.init.normal_(tensor, generator=torch.Generator().manual_seed(index))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def pictures(root, train, val):
    for split, count in (("train", train), ("val", val)):
        image_folder(root / split, num_classes=count)
    return root


def test_accuracy_is_the_share_of_right_answers(tmp_path, capsys):
    folder = weights(tmp_path / "model", "finetune", num_classes=10)
    assert main([str(folder), "--set", "evaluate.max_samples=40", "--out", str(tmp_path / "out")]) == 0
    task, val = load_trained(folder).task, open_container("digits", "val", image_size=32)
    right = 0
    for index in (i * len(val) // 40 for i in range(40)):
        sample = val.read(index)
        pixels = normalize(torch.tensor(sample.image)[None], (0.5,) * 3, (0.5,) * 3)
        right += int(task.logits(pixels).argmax()) == sample.label
    assert json.loads((tmp_path / "out" / "results.json").read_text())["top1"] == right / 40
    assert f"top1      {right / 40:.4f}" in capsys.readouterr().out


def test_miou_is_that_of_a_few_lines(tmp_path):
    settings = {"num_classes": 11, "reduce_zero_label": False, "channels": 8, "aux_channels": 8}
    folder = weights(tmp_path / "model", "segment", **settings)
    assert main([str(folder), "--set", "evaluate.max_samples=12", "--out", str(tmp_path / "out")]) == 0
    task, val = load_trained(folder).task, open_container("digits", "val", image_size=32)
    shared, either = torch.zeros(11), torch.zeros(11)
    for index in (i * len(val) // 12 for i in range(12)):
        sample = val.read(index)
        pixels = normalize(torch.tensor(sample.image)[None], (0.5,) * 3, (0.5,) * 3)
        predicted, true = task.logits(pixels).logits.argmax(1)[0], torch.tensor(sample.mask)
        for c in range(11):
            a, b = (predicted == c) & (true != 255), true == c
            shared[c] += (a & b).sum()
            either[c] += (a | b).sum()
    expected = (shared / either)[either > 0].mean().item()
    assert json.loads((tmp_path / "out" / "results.json").read_text())["miou"] == pytest.approx(expected, abs=1e-6)


def test_data_with_more_classes_than_the_model_is_refused(tmp_path, capsys):
    folder = weights(tmp_path / "model", "finetune", num_classes=3)
    data = pictures(tmp_path / "data", 5, 5)
    assert main([str(folder), "--data", str(data)]) == 2
    assert f"{data} has 5 classes and the model 3" in capsys.readouterr().err


def test_fewer_classes_are_pointed_out(tmp_path, capsys):
    folder = weights(tmp_path / "model", "finetune", num_classes=3)
    data = pictures(tmp_path / "data", 2, 2)
    assert main([str(folder), "--data", str(data)]) == 0
    assert f"{data} has 2 classes and the model 3" in capsys.readouterr().err


def test_classes_have_the_names_that_the_model_has_for_them(tmp_path, capsys):
    folder = weights(tmp_path / "model", "finetune", num_classes=3)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"id2label": {"0": "cat", "1": "dog", "2": "cow"}}))

    def classes(count):
        data = pictures(tmp_path / f"data{count}", count, count)
        assert main([str(folder), "--data", str(data), "--out", str(tmp_path)]) == 0
        with (tmp_path / "per_class.csv").open() as file:
            return [row["name"] for row in csv.DictReader(file)], capsys.readouterr().err

    assert classes(2)[0] == ["cat", "dog", "cow"], "the data does not name three"
    names, errors = classes(3)
    assert names == ["class_0", "class_1", "class_2"]
    assert "calls a class 'class_0' that the model calls 'cat'" in errors


@pytest.mark.parametrize("task", ["finetune", "segment"])
def test_a_split_in_which_nothing_can_be_scored_is_said(tmp_path, capsys, task):
    folder = weights(tmp_path / "model", task, num_classes=3)
    data = pictures(tmp_path / "data", 3, 3)
    if task == "finetune":
        for path in (data / "val").rglob("*.*"):
            path.write_bytes(b"no image")
    assert main([str(folder), "--data", str(data)]) == 2
    error = capsys.readouterr().err
    assert "there is nothing to score" in error
    assert error.count("left out:") == 12


def test_a_device_or_a_folder_that_is_not_there_is_said_before_the_work(tmp_path, capsys, monkeypatch):
    folder = weights(tmp_path / "model", "finetune", num_classes=10)
    monkeypatch.setattr("nepa_dist.score.score", lambda *_: pytest.fail("it has begun"))
    assert main([str(folder), "--device", "toaster"]) == 2
    assert "device toaster cannot be used here" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([str(folder), "--out", str(tmp_path / "file" / "out")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err
