"""Curves are drawn from what a run has logged, however little that is."""

import json
import math

import pytest
from PIL import Image

from nepa_dist.curves import plot_curves, plot_lines


def write_run(folder, rows):
    folder.mkdir()
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
