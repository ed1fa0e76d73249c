"""Models from a run, a checkpoint and weights; and ``python -m nepa_dist.visualize`` on them."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from images import image_folder
from nepa_dist.checkpoint.convert import convert
from nepa_dist.checkpoint.portable import CheckpointError
from nepa_dist.checkpoint.store import CheckpointStore
from nepa_dist.config import Config, FinetuneConfig
from nepa_dist.export import write_official
from nepa_dist.tasks.finetune import FinetuneTask
from nepa_dist.tasks.pretrain import PretrainTask
from nepa_dist.trained import WeightsError, load_trained
from nepa_dist.visualize import default_queries, main

MODEL = {"image_size": 24, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
CONFIG = Config.model_validate({"model": MODEL, "data": {"source": "digits", "mean": [0.1, 0.2, 0.3]}, "seed": 4})
TASK = PretrainTask(CONFIG.model, CONFIG.objective, seed=CONFIG.seed)


def save_step(run, step, *, ema=True):
    """A checkpoint whose raw weights are those of TASK plus the step; the averages are those of TASK."""
    entries = []
    for name, tensor in TASK.state_dict().items():
        fields = {"weight": tensor + step}
        entries.append((name, fields | {"ema": tensor} if ema else fields))
    return CheckpointStore(run / "checkpoints").save(step, iter(entries), {"config": CONFIG.model_dump(mode="json")})


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


def test_converted_weights_are_read_as_folder_and_as_file(run, tmp_path):
    convert(run / "checkpoints" / "step-00000002", tmp_path / "out", what="weights", dtype=torch.bfloat16)
    for path in (tmp_path / "out", tmp_path / "out" / "model.safetensors"):
        trained = load_trained(path)
        assert offset(trained) == 2
        assert trained.data.mean == (0.1, 0.2, 0.3)
        assert trained.task.backbone.cls_token.dtype == torch.float32


def test_official_weights_are_read_as_folder_and_as_file(tmp_path):
    write_official(TASK, tmp_path / "out")
    for path in (tmp_path / "out", tmp_path / "out" / "model.safetensors"):
        trained = load_trained(path)
        assert offset(trained) == 0
        assert trained.data.mean == (0.5, 0.5, 0.5)


def test_what_holds_no_model_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"there is no run and no file of weights at .*typo"):
        load_trained(tmp_path / "typo")
    with pytest.raises(WeightsError, match=r"is no run \(no checkpoints/"):
        load_trained(tmp_path)
    file = tmp_path / "alone.safetensors"
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(WeightsError, match=r"alone.safetensors has no config.json beside it"):
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
    with pytest.raises(WeightsError, match=r"alone.safetensors does not fit its configuration"):
        load_trained(file)
    file.write_bytes(b"no tensors")
    with pytest.raises(WeightsError, match=r"alone.safetensors cannot be read as safetensors"):
        load_trained(file)


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
    assert main([str(run), str(photo), "--layers", "0,-1", "--query", "1,2", "--size", "32", "--out", str(run / "new")]) == 0
    wider, lower = size_of(run / "new" / "0_maps.png")
    assert (wider > width, lower < height) == (True, True)


def test_a_classifier_has_no_similarity_map(tmp_path, photo):
    write_official(TASK, tmp_path / "plain")
    write_official(FinetuneTask(CONFIG.model, FinetuneConfig(num_classes=3)), tmp_path / "classifier")
    sizes = []
    for name in ("plain", "classifier"):
        assert main([str(tmp_path / name), str(photo), "--query-patch", "7", "--out", str(tmp_path / name)]) == 0
        sizes.append(size_of(tmp_path / name / "0_maps.png"))
    assert sizes[0][0] > sizes[1][0]


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
