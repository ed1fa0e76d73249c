"""Models and backbones from a run, a checkpoint and weights; and ``python -m nepa_dist.visualize`` on them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from images import image_folder
from nepa_dist.checkpoint.portable import CheckpointError
from nepa_dist.checkpoint.store import CheckpointStore
from nepa_dist.config import Config
from nepa_dist.export import export
from nepa_dist.official import read_json
from nepa_dist.tasks.build import build_task
from nepa_dist.trained import WeightsError, load_backbone, load_trained
from nepa_dist.visualize import default_queries, main

MODEL = {"image_size": 24, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
CONFIG = Config.model_validate({"model": MODEL, "data": {"source": "digits", "mean": [0.1, 0.2, 0.3]}, "seed": 4})
TASK = build_task(CONFIG)


CLASSIFIER = Config.model_validate(CONFIG.model_dump() | {"task": "finetune", "finetune": {"num_classes": 3}})


SEGMENTER = Config.model_validate(
    CONFIG.model_dump()
    | {"task": "segment", "segment": {"num_classes": 3, "taps": [0, 0, 1, 1], "channels": 16, "aux_channels": 8}}
)


def save_step(run, step, *, ema=True, config=CONFIG, **meta):
    """A checkpoint whose raw weights are the initial ones plus the step; the averages, of what is trained, are the initial."""
    entries = []
    for name, parameter in build_task(config).named_parameters():
        fields = {"weight": parameter.detach() + step}
        entries.append((name, fields | {"ema": parameter.detach()} if ema and parameter.requires_grad else fields))
    return CheckpointStore(run / "checkpoints").save(step, iter(entries), {"config": config.model_dump(mode="json"), **meta})


@pytest.fixture
def run(tmp_path):
    save_step(tmp_path / "run", 1)
    save_step(tmp_path / "run", 2)
    return tmp_path / "run"


def offset(trained):
    """What was added to the weights of TASK."""
    assert not trained.task.training
    return round(float((trained.task.backbone.cls_token - TASK.backbone.cls_token).detach().mean()), 3)


def test_a_run_gives_its_newest_averages_or_raw_weights(run):
    averaged, raw = load_trained(run), load_trained(run, ema=False)
    assert (offset(averaged), averaged.origin) == (0, "step 2, averaged weights")
    assert (offset(raw), raw.origin) == (2, "step 2, raw weights")
    assert averaged.data.mean == (0.1, 0.2, 0.3)
    assert offset(load_trained(run / "checkpoints" / "step-00000001", ema=False)) == 1


def test_a_run_without_averages_gives_raw_weights(tmp_path):
    save_step(tmp_path / "run", 3, ema=False)
    assert load_trained(tmp_path / "run").origin == "step 3, raw weights"


def test_a_damaged_checkpoint_is_passed_over_and_named(run, caplog):
    state = run / "checkpoints" / "step-00000002" / "state-00000.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    assert offset(load_trained(run, ema=False)) == 1
    assert "step-00000002" in caplog.text
    for file in run.glob("checkpoints/*/manifest.json"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"(?s)run has no checkpoint that can be used.*step-00000002.*step-00000001"):
        load_trained(run)


def test_exported_weights_are_read_as_folder_and_as_file(run, tmp_path):
    export(run, tmp_path / "out", ema=False, dtype=torch.bfloat16)
    for path in (tmp_path / "out", tmp_path / "out" / "model.safetensors"):
        trained = load_trained(path)
        assert offset(trained) == 2
        assert trained.data.mean == (0.1, 0.2, 0.3)
        assert trained.task.backbone.cls_token.dtype == torch.float32
        assert trained.origin == "step 2, raw weights"


def test_official_weights_are_read_as_folder_and_as_file(run, tmp_path):
    export(run, tmp_path / "out", format="official")
    for path in (tmp_path / "out", tmp_path / "out" / "model.safetensors"):
        trained = load_trained(path)
        assert offset(trained) == 0
        assert trained.data.mean == (0.1, 0.2, 0.3)
        assert trained.origin == "step 2, averaged weights"


def test_a_link_that_moves_while_it_is_read_gives_no_mixture(run, tmp_path, monkeypatch):
    export(run, tmp_path / "first", ema=False)
    save_step(tmp_path / "classifier", 1, config=CLASSIFIER)
    export(tmp_path / "classifier", tmp_path / "second")
    link = tmp_path / "best"
    link.symlink_to("first")

    def move(*arguments):
        settings = read_json(*arguments)
        link.unlink()
        link.symlink_to("second")
        return settings

    monkeypatch.setattr("nepa_dist.trained.read_json", move)
    trained = load_trained(link)
    assert (trained.config.task, offset(trained), trained.origin) == ("pretrain", 2, "step 2, raw weights")
    assert load_trained(link / "model.safetensors").config.task == "finetune"


def test_averages_of_official_weights_are_preferred(run, tmp_path):
    export(run, tmp_path / "out", format="official")
    state = load_file(tmp_path / "out" / "model.safetensors")
    save_file(state, tmp_path / "out" / "model.safetensors", {"format": "pt", "weights": "somebody's"})
    torch.save({name: tensor + 1 for name, tensor in state.items()}, tmp_path / "out" / "pytorch_model_ema.bin")
    averaged, other = load_trained(tmp_path / "out"), load_trained(tmp_path / "out", ema=False)
    assert (offset(averaged), averaged.origin) == (1, "averaged weights")
    assert (offset(other), other.origin) == (0, "weights as published")
    assert offset(load_trained(tmp_path / "out" / "pytorch_model_ema.bin")) == 1


def test_what_holds_no_model_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"there is no run and no file of weights at .*typo"):
        load_trained(tmp_path / "typo")
    with pytest.raises(WeightsError, match=r"is no run \(no checkpoints/"):
        load_trained(tmp_path)
    file = tmp_path / "alone.safetensors"
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(WeightsError, match=r"config.json is missing: it says what model these weights are of"):
        load_trained(file)
    for text, message in (
        ("{", "config.json is not JSON"),
        ("[]", "holds no settings"),
        ("{}", "holds no configuration"),
        ('{"model": {"depth": 0}}', r"not valid here:\n  - model.depth"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(WeightsError, match=message):
            load_trained(file)
    (tmp_path / "config.json").write_text(json.dumps({"model": MODEL}))
    with pytest.raises(WeightsError, match=r"(?s)alone.safetensors does not fit its configuration.*missing: .*left over: x"):
        load_trained(file)
    file.write_bytes(b"no tensors")
    with pytest.raises(WeightsError, match=r"alone.safetensors cannot be read as safetensors"):
        load_trained(file)


def test_what_was_frozen_has_no_average_and_gives_its_weight(tmp_path):
    save_step(tmp_path / "run", 1, config=CLASSIFIER)
    trained = load_trained(tmp_path / "run")
    assert (offset(trained), trained.origin) == (0, "step 1, averaged weights")
    frozen = (trained.task.backbone.patch_embed.weight - TASK.backbone.patch_embed.weight).detach()
    assert round(float(frozen.mean()), 3) == 1


def test_a_backbone_comes_without_the_head_of_its_task(run, tmp_path):
    save_step(tmp_path / "classifier", 1, config=CLASSIFIER)
    for path, causal in ((run, True), (tmp_path / "classifier", False)):
        backbone = load_backbone(path)
        assert (backbone.causal, backbone.mean, backbone.training) == (causal, (0.1, 0.2, 0.3), False)
        assert backbone.model.cls_token.equal(TASK.backbone.cls_token)
    assert load_backbone(run, ema=False).model.cls_token.equal(TASK.backbone.cls_token + 2)


@pytest.mark.parametrize(("size", "grid"), [((24, 24), (6, 6)), ((8, 32), (2, 8)), ((25, 30), (6, 8)), ((1, 3), (1, 1))])
def test_a_backbone_takes_images_of_any_size(run, size, grid):
    backbone = load_backbone(run)
    pixels = torch.randint(256, (2, *size, 3), dtype=torch.uint8)
    images = backbone.prepare(pixels)
    torch.testing.assert_close(images[:, 2], (pixels[..., 2] / 255 - 0.3) / 0.5)
    with torch.no_grad():
        features = backbone(images, layers=(0, -1))
        assert features.grid == grid
        assert features.hidden.shape == features.taps[-1].shape == (2, 1 + grid[0] * grid[1], 16)
        if size == (24, 24):
            assert features.hidden.equal(TASK.eval().backbone(images, causal=True).hidden)
            assert not features.hidden.equal(backbone(images, causal=False).hidden)


@pytest.mark.parametrize("pixels", [torch.zeros(1, 24, 24, 3), torch.zeros(1, 3, 24, 24, dtype=torch.uint8)])
def test_pixels_that_are_no_bytes_are_not_normalised_into_nonsense(run, pixels):
    with pytest.raises(ValueError, match=r"pixels must be uint8 \[B, H, W, 3\]"):
        load_backbone(run).prepare(pixels)


def test_weights_for_timm_are_said_to_be_written_only(run, tmp_path):
    export(run, tmp_path / "timm", format="timm")
    with pytest.raises(WeightsError, match="is in timm's format, which is only written"):
        load_trained(tmp_path / "timm")


def test_torch_hub_loads_a_backbone_from_a_folder_of_this_project(run, tmp_path):
    code = "import sys, torch; m = torch.hub.load(sys.argv[1], 'nepa_backbone', source='local', weights=sys.argv[2], ema=False)"
    code += "; print(m(torch.zeros(1, 3, 24, 24)).hidden.shape, m.provenance.origin)"
    root = Path(__file__).parents[1]
    command = [sys.executable, "-I", "-c", code, str(root), str(run)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "torch.Size([1, 37, 16]) step 2, raw weights"


@pytest.fixture
def photo(tmp_path):
    return image_folder(tmp_path / "photos", num_classes=1, per_class=1) / "class_0" / "0.jpg"


def size_of(path):
    with Image.open(path) as image:
        return image.size


def test_a_run_gets_a_picture_of_three_panels_and_three_queries(run, photo, capsys):
    assert main([str(run), str(photo)]) == 0
    picture = run / "figures" / "0_maps.png"
    assert f"wrote {picture}" in capsys.readouterr().out
    width, height = size_of(picture)
    assert main([str(run), str(photo), "--layers", "-2,-1", "--query", "1,2", "--size", "32", "--out", str(run / "new")]) == 0
    wider, lower = size_of(run / "new" / "0_maps.png")
    assert (wider > width, lower < height) == (True, True)


def test_a_classifier_has_no_similarity_map(tmp_path, photo):
    save_step(tmp_path / "plain", 1)
    save_step(tmp_path / "classifier", 1, config=CLASSIFIER)
    sizes = []
    for name in ("plain", "classifier"):
        assert main([str(tmp_path / name), str(photo), "--query-patch", "7", "--out", str(tmp_path / name)]) == 0
        sizes.append(size_of(tmp_path / name / "0_maps.png"))
    assert sizes[0][0] > sizes[1][0]


def test_options_of_maps_are_not_ignored_in_a_picture_of_classes(tmp_path, photo, capsys):
    save_step(tmp_path / "run", 1, config=SEGMENTER)
    for options in (["--size", "32"], ["--whole"]):
        assert main([str(tmp_path / "run"), str(photo), *options]) == 2
        error = capsys.readouterr().err
        assert "--size and --whole are for maps" in error
        assert "add --query or --layers" in error
        assert not (tmp_path / "run" / "figures").exists()
    assert main([str(tmp_path / "run"), str(photo)]) == 0
    assert main([str(tmp_path / "run"), str(photo), "--size", "32", "--query", "7,7"]) == 0
    assert {path.name for path in (tmp_path / "run" / "figures").iterdir()} == {"0_segmentation.png", "0_maps.png"}


def test_the_legend_names_classes_without_the_data(tmp_path, photo, monkeypatch):
    drawn = []
    monkeypatch.setattr("nepa_dist.visualize.draw_segmentation", lambda *arguments, title: drawn.append(list(arguments[4])))
    for names in ([], ["sky", "road", "car"]):
        config = SEGMENTER.model_copy(update={"data": SEGMENTER.data.model_copy(update={"source": "/data/gone"})})
        save_step(tmp_path / f"run{len(names)}", 1, config=config, class_names=names)
        export(tmp_path / f"run{len(names)}", tmp_path / f"out{len(names)}")
        for source in ("run", "out"):
            assert main([str(tmp_path / f"{source}{len(names)}"), str(photo), "--out", str(tmp_path)]) == 0
    assert drawn == [["0", "1", "2"], ["0", "1", "2"], ["sky", "road", "car"], ["sky", "road", "car"]]


def test_a_name_with_dollar_signs_is_no_formula(run, photo, tmp_path):
    file = photo.rename(photo.with_name(r"$\wrong$ $5.png"))
    assert main([str(run), str(file), "--out", str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == [r"$\wrong$ $5_maps.png"]


def test_images_of_one_name_get_a_picture_each(run, photo, tmp_path):
    other = tmp_path / "0.png"
    Image.new("RGB", (30, 30), "red").save(other)
    assert main([str(run), str(photo), str(other), "--query", "0,0", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.glob("*_maps.png")} == {"0_maps.png", "0-2_maps.png"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "30"], "size 30 is not a multiple of the patch size 4; nearest: 28 or 32"),
        (["--query", "6,0"], "query 6,0 is outside the grid of 6 x 6 patches"),
        (["--query-patch", "36"], "query patch 36 is outside the grid of 6 x 6: patches are 0 to 35"),
        (["--layers", "2"], "layer 2 is not a block: the model has 2"),
    ],
)
def test_mistakes_on_the_command_line_are_named(run, photo, capsys, options, message):
    assert main([str(run), str(photo), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (run / "figures").exists()


def test_every_image_that_cannot_be_read_is_named_before_anything_is_drawn(run, photo, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_bytes(photo.read_bytes()[:200])
    assert main([str(run), str(photo), str(tmp_path / "broken.jpg"), str(tmp_path / "gone.jpg")]) == 2
    error = capsys.readouterr().err
    assert "broken.jpg: " in error
    assert "gone.jpg: No such file" in error
    assert "0.jpg" not in error
    assert not (run / "figures").exists()


@pytest.mark.parametrize("text", ["3", "3;4", "a,b", "-1,2"])
def test_a_query_is_a_row_and_a_column(run, photo, text, capsys):
    with pytest.raises(SystemExit):
        main([str(run), str(photo), f"--query={text}"])
    assert "is not ROW,COL" in capsys.readouterr().err


@pytest.mark.parametrize(("side", "count"), [(1, 1), (2, 3), (16, 3)])
def test_default_queries_differ_and_are_in_the_grid(side, count):
    queries = default_queries(side, side)
    assert queries[0] == (side // 2, side // 2)
    assert len(set(queries)) == len(queries) == count
    assert all(0 <= part < side for query in queries for part in query)
