"""Curves are drawn from what a run has logged, however little that is; maps of images of any shape."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from nepa_dist.checkpoint.store import CheckpointStore
from nepa_dist.config import Config
from nepa_dist.curves import plot_curves, plot_lines
from nepa_dist.tasks.pretrain import PretrainTask
from nepa_dist.visualize import main

VIOLET = (150, 0, 255)


def write_run(folder, rows):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def full_row(step):
    return {
        "step": step,
        "time": 0.0,
        "loss": -1 + math.exp(-step / 100),
        "grad_norm": 0.1 + 1 / (1 + step),
        "embedding_mean_cosine.target": 0.2,
        "embedding_effective_rank.target": 7.5,
        "embedding_mean_cosine.pred": 0.3,
        "embedding_effective_rank.pred": 6.5,
    }


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) >= 400
        return image.convert("RGB")


def count(image, rgb):
    return sum(n for n, color in image.getcolors(1 << 24) if color == rgb)


def test_a_run_gets_its_three_figures(tmp_path):
    run = write_run(tmp_path / "run", [full_row(step) for step in range(10, 1010, 10)])
    paths = plot_curves(run)
    assert [path.relative_to(run).as_posix() for path in paths] == [
        "figures/loss.png",
        "figures/grad_norm.png",
        "figures/collapse.png",
    ]
    for path in paths:
        assert count(pixels(path), (0x1F, 0x6F, 0xB4)) > 100, "the line is there"


@pytest.mark.parametrize("num_rows", [1, 2, 19, 20])
def test_few_points_are_drawn(tmp_path, num_rows):
    run = write_run(tmp_path / "run", [full_row(step) for step in range(num_rows)])
    for path in plot_curves(run):
        assert count(pixels(path), (0x1F, 0x6F, 0xB4)) > 5


def test_nothing_logged_gives_no_figure(tmp_path):
    assert plot_curves(write_run(tmp_path / "empty", [])) == []
    (tmp_path / "new").mkdir()
    assert plot_curves(tmp_path / "new") == []
    assert not (tmp_path / "new" / "figures").exists()


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="typo"):
        plot_curves(tmp_path / "typo")


def test_figures_without_values_are_left_out(tmp_path):
    run = write_run(tmp_path / "run", [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4, "grad_norm": "NaN"}])
    assert [path.name for path in plot_curves(run)] == ["loss.png"]


def test_values_that_cannot_be_drawn_do_not_stop_the_others(tmp_path):
    rows = [full_row(step) for step in range(1, 60)]
    rows[5] |= {"loss": "NaN", "grad_norm": "Infinity"}
    rows[6] |= {"grad_norm": 0.0}
    paths = plot_curves(write_run(tmp_path / "run", rows))
    assert len(paths) == 3
    assert count(pixels(paths[1]), (0x1F, 0x6F, 0xB4)) > 100


def test_skipped_steps_are_marked(tmp_path):
    mark = (0xC0, 0x18, 0x18)
    rows = [full_row(step) | {"skipped_steps_total": 0, "applied": 1} for step in range(1, 60)]
    clean = plot_curves(write_run(tmp_path / "clean", rows))
    assert count(pixels(clean[0]), mark) == 0
    for row in rows[30:]:
        row["skipped_steps_total"] = 2
    skipped = plot_curves(write_run(tmp_path / "skipped", rows))
    assert count(pixels(skipped[0]), mark) > 0
    assert count(pixels(skipped[1]), mark) > 0


def test_lines_are_drawn_into_a_new_folder(tmp_path):
    path = tmp_path / "a" / "b" / "lines.png"
    series = {"one": ([0.0, 1.0], [1.0, 2.0]), "two": ([0.0, 1.0], [2.0, 1.0])}
    plot_lines(path, series, xlabel="images", ylabel="top1", title="two lines")
    image = pixels(path)
    assert count(image, (0x1F, 0x6F, 0xB4)) > 100
    assert count(image, (0xD9, 0x71, 0x1C)) > 100


def test_scores_have_curves_and_a_repeated_value_is_one_point(tmp_path):
    rows = [full_row(step) for step in range(10, 60, 10)]
    for row in rows[2:]:  # measured beside training at step 20, and shown from then on
        row |= {"knn_top1": 0.25, "knn_step": 20}
    rows[-1] |= {"knn_top1": 0.5, "knn_step": 40, "top1": 0.4, "top5": 0.8}
    run = write_run(tmp_path / "run", rows)
    assert [path.name for path in plot_curves(run)] == [
        "loss.png",
        "grad_norm.png",
        "collapse.png",
        "validation.png",
        "knn.png",
    ]
    assert count(pixels(run / "figures" / "knn.png"), (0x1F, 0x6F, 0xB4)) > 100


def test_a_measurement_is_drawn_at_its_own_step(tmp_path):
    late = [full_row(step) | {"knn_top1": 0.25, "knn_step": 20} for step in range(30, 90, 10)]
    once = [full_row(20) | {"knn_top1": 0.25, "knn_step": 20}]
    pictures = [pixels(plot_curves(write_run(tmp_path / name / "run", rows))[-1]) for name, rows in (("a", late), ("b", once))]
    assert pictures[0].tobytes() == pictures[1].tobytes()


def test_the_command_draws_curves_where_no_image_is_named(tmp_path, capsys):
    assert main([str(write_run(tmp_path / "run", [full_row(1), full_row(2)]))]) == 0
    assert capsys.readouterr().out.count("wrote ") == 3
    assert (tmp_path / "run" / "figures" / "loss.png").exists()
    assert main([str(write_run(tmp_path / "empty", []))]) == 2
    assert "there is nothing to draw" in capsys.readouterr().err
    assert main([str(tmp_path / "typo")]) == 2
    assert f"there is no run and no file of weights at {tmp_path / 'typo'}" in capsys.readouterr().err


@pytest.fixture
def model(tmp_path):
    """A run of a tiny model with one checkpoint."""
    config = Config.model_validate({"model": {"image_size": 24, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}})
    task = PretrainTask(config.model)
    entries = iter((name, {"weight": tensor}) for name, tensor in task.state_dict().items())
    CheckpointStore(tmp_path / "run" / "checkpoints").save(1, entries, {"config": config.model_dump(mode="json")})
    return tmp_path / "run"


def shape_of_the_image(path):
    """Height over width of the panel that shows the image as it is, from the picture."""
    with Image.open(path) as picture:
        here = (np.asarray(picture.convert("RGB")) == VIOLET).all(axis=2)
    rows, columns = np.flatnonzero(here.any(axis=1)), np.flatnonzero(here.any(axis=0))
    return (rows[-1] - rows[0]) / (columns[-1] - columns[0])


@pytest.mark.parametrize(
    ("options", "expected"),
    [([], 1.0), (["--size", "16x32"], 0.5), (["--whole"], 6 / 9), (["--whole", "--size", "8"], 2 / 3), (["--size", "32"], 1.0)],
)
def test_images_of_any_shape_and_size(tmp_path, model, options, expected):
    Image.new("RGB", (90, 60), VIOLET).save(tmp_path / "violet.png")
    assert main([str(model), str(tmp_path / "violet.png"), "--query", "1,1", *options]) == 0
    assert shape_of_the_image(model / "figures" / "violet_maps.png") == pytest.approx(expected, abs=0.02)


def test_shapes_that_do_not_fit_are_refused_before_anything_is_drawn(tmp_path, model, capsys):
    for name, size in (("wide", (90, 60)), ("tall", (60, 90))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    images = [str(tmp_path / "wide.png"), str(tmp_path / "tall.png")]
    for options, message in (
        (["--whole", "--query", "3,8"], "query 3,8 is outside the grid of 9 x 6 patches"),
        (["--whole", "--query-patch", "54"], "query patch 54 is outside the grid of 6 x 9: patches are 0 to 53"),
        (["--size", "16x30"], "size 30 is not a multiple of the patch size 4; nearest: 28 or 32"),
        (["--size", "16x32", "--whole"], "--whole keeps the shape of the image: give one size, not 16x32"),
    ):
        assert main([str(model), *images, *options]) == 2
        assert message in capsys.readouterr().err
    assert not (model / "figures").exists()
    with pytest.raises(SystemExit):
        main([str(model), *images, "--size", "16by32"])
    assert "'16by32' is neither PIXELS nor HEIGHTxWIDTH" in capsys.readouterr().err
