"""``python -m nepa_dist.export``: every format, from every kind of source; what is refused; the model card."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm_reference import import_timm

from nepa_dist import timm_names
from nepa_dist.checkpoint.store import CheckpointStore
from nepa_dist.config import Config
from nepa_dist.export import main
from nepa_dist.tasks.build import build_task
from nepa_dist.trained import WeightsError, load_backbone, load_trained

MODEL = {"image_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2}
DATA = {"source": "/data/secret-place/photos", "mean": [0.1, 0.2, 0.3]}
PRETRAIN = {"task": "pretrain", "name": "small", "model": MODEL, "data": DATA, "steps": 20}
FINETUNE = PRETRAIN | {"task": "finetune", "finetune": {"num_classes": 5}}
SEGMENT = PRETRAIN | {
    "task": "segment",
    "segment": {"num_classes": 5, "taps": [0, 0, 1, 1], "channels": 32, "aux_channels": 32},
}
NAMES = ["cat", "dog", "été", "id2label", "dog 2"]
IMAGES = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))


def save_run(folder, values, step=20):
    """A run with one checkpoint: random weights, and averages (of what is trained) that are other random weights."""
    config = Config.model_validate(values)
    generator = torch.Generator().manual_seed(0)
    entries = []
    for name, parameter in build_task(config).named_parameters():
        fields = ["weight", "ema"] if parameter.requires_grad else ["weight"]
        entries.append((name, {field: 0.3 * torch.randn(parameter.shape, generator=generator) for field in fields}))
    meta = {
        "class_names": NAMES[: config.num_classes or 0],
        "config": config.model_dump(mode="json"),
        "state": {"samples_seen": 5120},
        "config_digest": "c0ffee",
    }
    CheckpointStore(folder / "checkpoints").save(step, entries, meta | {"data_fingerprint": "beef", "versions": {"torch": "2"}})
    return folder


@pytest.fixture
def runs(tmp_path):
    """Folders of a run of each task."""
    return {values["task"]: save_run(tmp_path / values["task"], values) for values in (PRETRAIN, FINETUNE, SEGMENT)}


def header(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return file.metadata()


def hidden(path, **options):
    with torch.no_grad():
        return load_backbone(path, **options)(IMAGES).hidden


@pytest.mark.parametrize("task", ["pretrain", "finetune", "segment"])
@pytest.mark.parametrize("options", [[], ["--raw"]])
def test_native_weights_are_the_model_of_the_run(runs, tmp_path, task, options, capsys):
    out = tmp_path / "new" / "out"
    assert main([str(runs[task]), str(out), *options]) == 0
    kind, ema = ("raw weights", False) if options else ("averaged weights", True)
    assert f"small: step 20, {kind}" in capsys.readouterr().out
    assert sorted(os.listdir(out)) == ["README.md", "config.json", "model.safetensors"]
    assert os.listdir(out.parent) == ["out"]
    mine, theirs = load_trained(out), load_trained(runs[task], ema=ema)
    assert mine.config == theirs.config
    assert all(mine.task.state_dict()[name].equal(tensor) for name, tensor in theirs.task.state_dict().items())
    facts = header(out)
    assert (facts["weights"], facts["step"], facts["samples_seen"]) == ("ema" if ema else "raw", "20", "5120")
    assert (facts["config_digest"], facts["data_fingerprint"], facts["format"]) == ("c0ffee", "beef", "pt")


@pytest.mark.parametrize("task", ["pretrain", "finetune", "segment"])
@pytest.mark.parametrize("format", ["native", "official"])
def test_the_backbone_alone_of_every_task(runs, tmp_path, task, format):
    assert main([str(runs[task]), str(tmp_path / "out"), "--backbone", "--format", format]) == 0
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert not [name for name in names if name.startswith(("head.", "classifier.", "fc_norm."))]
    assert hidden(tmp_path / "out").equal(hidden(runs[task]))
    assert load_backbone(tmp_path / "out").causal == (task == "pretrain")
    assert "left out" in (tmp_path / "out" / "README.md").read_text() or task == "pretrain"


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_official_weights_and_back(runs, tmp_path, task):
    assert main([str(runs[task]), str(tmp_path / "official"), "--format", "official"]) == 0
    assert "preprocessor_config.json" in os.listdir(tmp_path / "official")
    assert json.loads((tmp_path / "official" / "config.json").read_text())["dtype"] == "float32"
    assert main([str(tmp_path / "official"), str(tmp_path / "native")]) == 0
    assert header(tmp_path / "native") == header(tmp_path / "official")
    assert header(tmp_path / "native")["weights"] == "ema"
    again, first = load_trained(tmp_path / "native"), load_trained(runs[task])
    assert (again.config.task, again.config.causal, again.data.mean) == (task, first.config.causal, first.data.mean)
    assert all(again.task.state_dict()[name].equal(tensor) for name, tensor in first.task.state_dict().items())


def test_facts_travel_through_another_export(runs, tmp_path):
    (runs["pretrain"] / "metrics.jsonl").write_text('{"step": 20, "time": 1, "loss": -0.5}\n')
    assert main([str(runs["pretrain"]), str(tmp_path / "first")]) == 0
    assert main([str(tmp_path / "first"), str(tmp_path / "second"), "--dtype", "bf16"]) == 0
    assert header(tmp_path / "second") == header(tmp_path / "first")
    weight = load_file(tmp_path / "second" / "model.safetensors")["backbone.cls_token"]
    assert weight.equal(load_file(tmp_path / "first" / "model.safetensors")["backbone.cls_token"].bfloat16())
    assert "| training loss | -0.5000 | 20 |" in (tmp_path / "second" / "README.md").read_text()


def test_the_usage_that_the_card_of_timm_weights_shows_works(runs, tmp_path, monkeypatch):
    assert main([str(runs["finetune"]), str(tmp_path / "out"), "--format", "timm"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    usage = card.split("```python\n")[1].split("\n```")[0]
    assert usage == timm_names.USAGE.format(folder="out", causal=False)
    try:
        import_timm()
    except ImportError as error:
        pytest.skip(f"timm is not installed: {error}")
    monkeypatch.chdir(tmp_path)
    found = {"images": IMAGES}
    exec(usage, found)
    torch.testing.assert_close(found["features"], hidden(runs["finetune"]), atol=1e-5, rtol=1e-5)


def test_the_usage_that_the_card_of_other_weights_shows_works(runs, tmp_path, monkeypatch):
    assert main([str(runs["segment"]), str(tmp_path / "out")]) == 0
    usage = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("\n```")[0]
    monkeypatch.chdir(tmp_path)
    found = {"pixels": torch.zeros(1, 30, 40, 3, dtype=torch.uint8)}
    exec(usage, found)
    assert found["features"].grid == (4, 6)


def test_the_card_says_what_the_weights_are_and_what_they_score(runs, tmp_path):
    run = runs["finetune"]
    rows = [{"step": 10, "loss": 3.0}, {"step": 20, "loss": 1.5, "top1": 0.75}, {"step": 30, "loss": 0.1}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    accuracies = {"embed": (0.2, 0.3), 0: (0.5, 0.6), "final": (0.4, 0.7)}
    probes = [{"layer": layer, "top1": {"knn_20": knn, "linear": linear}} for layer, (knn, linear) in accuracies.items()]
    evaluation = {"step": 20, "weights": "ema", "objective": {"loss": -0.9}, "trained": probes}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    assert main([str(run), str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "a classifier of 5 classes",
        "| weights | averaged weights (moving average) |",
        "| step | 20 |",
        "| images seen | 5,120 |",
        "| attention in training | every token sees every other |",
        "| normalisation of pixels in [0, 1] | mean [0.1, 0.2, 0.3], std [0.5, 0.5, 0.5] |",
        "| training data | photos |",
        "| digest of the training data | beef |",
        "| training loss | 1.5000 | 20 |",
        "| top1, validation during training | 0.7500 | 20 |",
        "| k-NN (k = 20) top-1, layer 0 (ema weights, held-out images) | 0.5000 | 20 |",
        "| k-NN (k = 20) top-1, layer final (ema weights, held-out images) | 0.4000 | 20 |",
        "| linear probe top-1, layer final (ema weights, held-out images) | 0.7000 | 20 |",
        "  embed_dim: 32",
        "  num_classes: 5",
    ):
        assert part in card, part
    assert card.count("linear probe") == 1, "the best layer is the last"
    assert "secret-place" not in card
    (run / "evaluation.json").write_text("{")
    (run / "metrics.jsonl").unlink()
    assert main([str(run), str(tmp_path / "bare")]) == 0
    assert "None are recorded." in (tmp_path / "bare" / "README.md").read_text()


@pytest.mark.parametrize(("task", "form"), [("finetune", "native"), ("segment", "native"), ("finetune", "official")])
def test_the_names_of_classes_travel_along(runs, tmp_path, task, form, capsys):
    first, again, backbone = tmp_path / "first", tmp_path / "again", tmp_path / "backbone"
    assert main([str(runs[task]), str(first), "--format", form]) == 0
    settings = json.loads((first / "config.json").read_text())
    assert settings["id2label"] == {"0": "cat", "1": "dog", "2": "été", "3": "id2label", "4": "dog 2"}
    assert settings["label2id"] == {name: index for index, name in enumerate(NAMES)}
    assert main([str(first), str(again)]) == 0
    assert main([str(first), str(backbone), "--backbone"]) == 0
    assert [load_trained(folder).class_names for folder in (runs[task], first, again, backbone)] == [*3 * [tuple(NAMES)], ()]
    assert "id2label" not in json.loads((backbone / "config.json").read_text())


def test_names_that_do_not_fit_the_head_are_refused(runs, tmp_path):
    assert main([str(runs["finetune"]), str(tmp_path / "out")]) == 0
    file = tmp_path / "out" / "config.json"
    settings = json.loads(file.read_text())
    for labels in (
        {"0": "cat"},
        ["cat"],
        {str(index + 1): "cat" for index in range(5)},
        {str(index): index for index in range(5)},
    ):
        file.write_text(json.dumps(settings | {"id2label": labels}))
        with pytest.raises(WeightsError, match=r"config\.json: id2label must name the classes of the model, which are 5"):
            load_trained(tmp_path / "out")
    same = {str(index): "cat" for index in range(5)}
    file.write_text(json.dumps(settings | {"id2label": same}))
    assert main([str(tmp_path / "out"), str(tmp_path / "again")]) == 0
    assert "label2id" not in json.loads((tmp_path / "again" / "config.json").read_text()), "there is no such number"
    assert load_trained(tmp_path / "again").class_names == ("cat",) * 5


@pytest.mark.parametrize("form", ["native", "official"])
def test_averages_are_not_given_for_raw_weights(runs, tmp_path, capsys, form):
    assert main([str(runs["finetune"]), str(tmp_path / "averages"), "--format", form]) == 0
    assert main([str(runs["finetune"]), str(tmp_path / "raw"), "--format", form, "--raw"]) == 0
    capsys.readouterr()
    assert main([str(tmp_path / "averages"), str(tmp_path / "out"), "--raw"]) == 2
    output = capsys.readouterr()
    assert "averages holds only step 20, averaged weights: leave --raw out" in output.err
    assert output.out == ""
    assert not (tmp_path / "out").exists()
    with pytest.raises(WeightsError, match="averages holds only step 20"):
        load_backbone(tmp_path / "averages", ema=False)
    assert main([str(tmp_path / "raw"), str(tmp_path / "out"), "--raw"]) == 0
    assert header(tmp_path / "out")["weights"] == "raw"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/typo", "{tmp}/out"], "there is no run and no file of weights at"),
        (["{tmp}/pretrain", "{tmp}/finetune"], "finetune exists; name a new folder"),
        (["{tmp}/pretrain", "{tmp}/file/out"], "out cannot be written"),
        (["{tmp}/segment", "{tmp}/out", "--format", "official"], "no head for task 'segment'; the backbone alone"),
        (["{tmp}/segment", "{tmp}/out", "--format", "timm"], "no head for task 'segment'; the backbone alone"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_left_behind(runs, tmp_path, capsys, arguments, message):
    (tmp_path / "file").write_text("")
    before = sorted(os.listdir(tmp_path))
    assert main([argument.format(tmp=tmp_path) for argument in arguments]) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.out == ""
    assert sorted(os.listdir(tmp_path)) == before


def test_a_full_disk_leaves_nothing_behind(runs, tmp_path, monkeypatch, capsys):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    before = sorted(os.listdir(tmp_path))
    assert main([str(runs["pretrain"]), str(tmp_path / "out")]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == before


def test_a_header_that_is_malformed_is_named(runs, tmp_path, capsys):
    assert main([str(runs["pretrain"]), str(tmp_path / "out")]) == 0
    file = tmp_path / "out" / "model.safetensors"
    for facts in ({"weights": "magic"}, {"weights": "ema", "step": "soon"}, {"weights": "ema", "results": "[1]"}):
        save_file(load_file(file), tmp_path / "out" / "other.safetensors", {"nepa_dist": "0.1.0", **facts})
        assert main([str(tmp_path / "out" / "other.safetensors"), str(tmp_path / "again")]) == 2
        assert "the header of" in capsys.readouterr().err
