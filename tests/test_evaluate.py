"""``python -m nepa_dist.evaluate RUN`` on a short run with the embedded data."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from images import image_folder
from nepa_dist import evaluate as module
from nepa_dist.evaluate import main
from nepa_dist.export import main as export

ROOT = Path(__file__).parents[1]
SETTINGS = [
    "model.depth=2",
    "model.embed_dim=32",
    "model.num_heads=2",
    "steps=60",
    "global_batch_size=16",
    "optim.base_lr=0.05",
]
SETTINGS += ["optim.ema_decay=0.8", "checkpoint.every=60"]
FEW = ["--num-train", "100", "--num-test", "50"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "probe-me"
    sets = [part for setting in SETTINGS for part in ("--set", setting)]
    command = [
        sys.executable,
        str(ROOT / "jobs/submit.py"),
        "pretrain",
        "vit_tiny",
        "--data",
        "digits",
        "--run-dir",
        str(folder),
    ]
    subprocess.run([*command, *sets], check=True, timeout=120, capture_output=True)
    return folder


def evaluate(*arguments):
    command = [sys.executable, "-P", "-m", "nepa_dist.evaluate", *map(str, arguments)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, timeout=120, capture_output=True, text=True, env=environment, check=False)


def results(folder):
    return json.loads((folder / "evaluation.json").read_text())


def test_table_json_and_picture(run_dir):
    result = evaluate(run_dir, "--num-train", "300", "--num-test", "100")
    assert result.returncode == 0, result.stderr
    assert "probe-me, step 60, averaged weights" in result.stdout
    values = results(run_dir)
    for side in ("trained", "untrained"):
        assert [row["layer"] for row in values[side]] == ["embed", 0, 1, "final"]
        for row in values[side]:
            assert list(row["top1"]) == ["knn_10", "knn_20", "linear"]
            assert all(0 <= accuracy <= 1 for accuracy in row["top1"].values())
    assert (values["num_train"], values["num_test"], values["num_classes"]) == (300, 100, 10)
    assert (values["step"], values["weights"], values["data"], values["causal"]) == (60, "ema", "digits", True)
    objective = values["objective"]
    assert objective["loss"] == pytest.approx(-objective["prediction_cosine"], abs=1e-6)
    assert objective["prediction_skill_const"] > 0.1
    assert f"{objective['loss']:.4f}" in result.stdout
    assert f"{100 * values['trained'][1]['top1']['linear']:.1f}" in result.stdout
    with Image.open(run_dir / "figures" / "probe.png") as picture:
        assert min(picture.size) > 400
    # Trained and untrained differ, so both were really measured.
    assert values["trained"][-1]["top1"] != values["untrained"][-1]["top1"]


def test_probes_layers_and_neighbours_are_as_asked_for(run_dir, tmp_path, capsys):
    options = ["--probes", "attentive,knn", "--layers", "-1,final", "--k", "3", "--epochs", "1", "--no-untrained"]
    assert main([str(run_dir), *options, *FEW, "--out", str(tmp_path / "new" / "here")]) == 0
    values = results(tmp_path / "new" / "here")
    assert [(row["layer"], list(row["top1"])) for row in values["trained"]] == [
        (1, ["knn_3", "attentive"]),
        ("final", ["knn_3", "attentive"]),
    ]
    assert values["untrained"] == []
    assert values["protocol"]["attentive_epochs"] == 1
    text = capsys.readouterr().out
    assert "k-NN, k = 3" in text
    assert "untrained" not in text
    assert (tmp_path / "new" / "here" / "figures" / "probe.png").exists()


def test_attention_can_be_made_to_look_both_ways(run_dir, tmp_path):
    rows = {}
    for name, options in {"causal": [], "both": ["--bidirectional"], "cls": ["--bidirectional", "--pooling", "cls"]}.items():
        options = [*options, "--probes", "linear", "--no-untrained"]
        assert main([str(run_dir), *options, *FEW, "--out", str(tmp_path / name)]) == 0
        values = results(tmp_path / name)
        assert values["causal"] == (name == "causal")
        rows[name] = {row["layer"]: row["top1"]["linear"] for row in values["trained"]}
    assert rows["causal"]["embed"] == rows["both"]["embed"], "before any attention"
    assert rows["causal"][1] != rows["both"][1]
    assert list(rows["cls"]) == [0, 1, "final"], "CLS knows nothing before the first block"


def test_raw_weights_on_request(run_dir, tmp_path):
    losses = []
    for options, kind in (([], "averaged"), (["--raw", "--pooling", "last"], "raw")):
        assert main([str(run_dir), *options, *FEW, "--layers", "final", "--out", str(tmp_path)]) == 0
        values = results(tmp_path)
        assert values["origin"] == f"step 60, {kind} weights"
        losses.append(values["objective"]["loss"])
    assert losses[0] != losses[1]


@pytest.mark.parametrize("form", ["ours", "official"])
def test_exported_and_official_weights(run_dir, tmp_path, form, monkeypatch):
    assert export([str(run_dir), str(tmp_path / "weights"), *(["--format", "official"] if form == "official" else [])]) == 0
    monkeypatch.chdir(tmp_path)
    arguments = ["--layers", "1", "--no-untrained", *FEW]
    assert main([str(tmp_path / "weights"), "--data", "digits", *arguments]) == 0
    assert main([str(run_dir), *arguments, "--out", str(tmp_path / "run")]) == 0
    weights, run = results(tmp_path), results(tmp_path / "run")
    assert weights["trained"] == run["trained"]
    assert weights["objective"] == pytest.approx(run["objective"])
    assert (tmp_path / "figures" / "probe.png").exists()


def test_what_cannot_be_evaluated_is_said_in_one_line(run_dir, tmp_path, capsys, monkeypatch):
    result = evaluate(tmp_path / "nowhere")
    assert (result.returncode, result.stdout) == (2, "")
    assert "there is no run and no file of weights at" in result.stderr
    assert "Traceback" not in result.stderr
    images = image_folder(tmp_path / "images", num_classes=1, per_class=2, size=(48, 40))
    for options, message in (
        (["--data", str(tmp_path / "missing")], "missing"),
        (["--data", str(images)], "has no val/ folder"),
        (["--layers", "2"], "layer 2 is not a block: the model has 2, numbered from 0 to 1"),
        (["--pooling", "cls"], "pooling 'cls' with causal attention"),
        (["--device", "toaster"], "device toaster cannot be used here"),
        (["--k", "200"], "k = 200 neighbours were asked for, but there are 100 training images"),
    ):
        assert main([str(run_dir), *FEW, *options]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr(module, "available_bytes", lambda: 1 << 20)
    assert main([str(run_dir), *FEW]) == 2
    assert "4 layers of width 32 with 100 + 50 images need about" in (text := capsys.readouterr().err)
    assert "--num-train" in text


def test_a_folder_that_cannot_be_written_costs_no_results(run_dir, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate", lambda *_: pytest.fail("it has begun"))
        assert main([str(run_dir), *FEW, "--out", str(tmp_path / "file" / "out")]) == 2
    (tmp_path / "figures").write_text("")  # where a folder is to be
    assert main([str(run_dir), *FEW, "--no-untrained", "--layers", "1", "--out", str(tmp_path)]) == 2
    assert "probe-me, step 60, averaged weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--probes", "knn,magic"),
        ("--layers", "3,last"),
        ("--layers", "-1,last"),
        ("--k", "10,0"),
        ("--num-train", "0"),
        ("--epochs", "all"),
    ],
)
def test_options_that_mean_nothing_are_named(option, value, capsys):
    with pytest.raises(SystemExit):
        main(["run", option, value])
    assert option in capsys.readouterr().err
