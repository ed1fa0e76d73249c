"""Pictures over pixels: what is in the file is where the data says it is."""

import colorsys

import numpy as np
import pytest
from PIL import Image

from nepa_dist.pictures import IGNORE, MapRow, class_colors, draw_maps, draw_segmentation

QUERY_RED = (0xE8, 0x11, 0x2D)
RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8)


def read(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def boxes_of(picture, color, num_panels):
    """Rows and columns where a colour is, for each panel from the left."""
    here = (np.abs(picture - color) <= 2).all(axis=2)
    columns = np.flatnonzero(here.any(axis=0))
    groups = np.split(columns, np.flatnonzero(np.diff(columns) > picture.shape[1] / num_panels / 4) + 1)
    return [(np.flatnonzero(here[:, group].any(axis=1)), group) for group in groups]


@pytest.mark.parametrize("query", [(0, 0), (2, 3), (1, 0)])
def test_the_query_is_outlined_where_it_is_in_every_panel(tmp_path, query):
    maps = np.full((3, 4), 1 / 12, dtype=np.float32)
    path = tmp_path / "new" / "maps.png"
    black = np.zeros((48, 64, 3), dtype=np.uint8)
    black[4:44, 4:60] = 200  # only a frame, so that titles between the panels are not taken for it
    draw_maps(path, black, [MapRow(query, {"layer 0": maps}, maps)], title="")
    picture = read(path)
    outlines = boxes_of(picture, QUERY_RED, 3)
    assert len(outlines) == 3
    heights, widths = ({axis[-1] - axis[0] for axis in axes} for axes in zip(*outlines, strict=True))
    assert max(heights) - min(heights) <= 3
    assert max(rows.mean() for rows, _ in outlines) - min(rows.mean() for rows, _ in outlines) <= 8, "at one height"
    assert max(widths) - min(widths) <= 3
    assert max(heights) == pytest.approx(max(widths), abs=5), "patches of 16 x 16 pixels stay square"
    scale = max(widths) / 16
    frame = (np.abs(picture[:, : picture.shape[1] // 3 - 40]).sum(axis=2) == 0) & (np.arange(len(picture))[:, None] > 70)
    frame_rows, frame_columns = np.flatnonzero(frame.sum(axis=1) > 30), np.flatnonzero(frame.sum(axis=0) > 30)
    rows, columns = outlines[0]
    assert (rows.mean() - frame_rows[0]) / scale / 16 == pytest.approx(query[0] + 0.5, abs=0.2)
    assert (columns.mean() - frame_columns[0]) / scale / 16 == pytest.approx(query[1] + 0.5, abs=0.2)


def test_a_map_lies_over_its_patches(tmp_path):
    """One patch has all the attention; its colour fills the place of that patch, and the others stay gray."""
    weights = np.zeros((3, 4), dtype=np.float32)
    weights[0, 1] = 1
    gray = np.full((48, 64, 3), 128, dtype=np.uint8)
    draw_maps(tmp_path / "maps.png", gray, [MapRow((2, 3), {"layer 0": weights}, None)], title="")
    picture = read(tmp_path / "maps.png")
    right = picture[:, picture.shape[1] // 2 :]
    plain = (np.abs(right - (110 + 0.45 * 128)) <= 2).all(axis=2)
    rows, columns = np.flatnonzero(plain.sum(axis=1) > 50), np.flatnonzero(plain.sum(axis=0) > 50)
    side = (columns[-1] - columns[0] + 1) / 4
    patches = right[rows[0] : rows[-1], columns[0] : columns[-1]]
    for row in range(3):
        for column in range(4):
            middle = patches[int((row + 0.5) * side), int((column + 0.5) * side)]
            colourful = middle.max() - middle.min() > 20
            assert colourful == (row == 0 and column == 1), (row, column, middle)


def test_several_queries_make_a_row_each_and_a_flat_map_is_drawn(tmp_path):
    rows = [MapRow((r, 1), {"a": np.eye(3, 4), "b": np.ones((3, 4)) / 12}, np.ones((3, 4))) for r in range(3)]
    draw_maps(tmp_path / "one.png", PHOTO, rows[:1], title="one")
    draw_maps(tmp_path / "three.png", PHOTO, rows, title="three")
    one, three = read(tmp_path / "one.png"), read(tmp_path / "three.png")
    assert one.shape[1] == three.shape[1]
    assert three.shape[0] > 2 * one.shape[0]


def test_maps_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no query"):
        draw_maps(tmp_path / "x.png", PHOTO, [], title="")
    with pytest.raises(ValueError, match=r"\(5, 4\) patches does not divide an image of \(48, 64\)"):
        draw_maps(tmp_path / "x.png", PHOTO, [MapRow((0, 0), {"a": np.ones((5, 4))}, None)], title="")
    assert not list(tmp_path.iterdir())


def test_class_colours_differ_stay_and_are_not_gray():
    colors = class_colors(256)
    assert colors.shape == (256, 3)
    assert colors.dtype == np.uint8
    assert len(np.unique(colors, axis=0)) == 256
    assert np.array_equal(class_colors(150), colors[:150])
    early = colors[:20].astype(int)
    distance = np.abs(early[:, None] - early[None]).sum(axis=2) + 1000 * np.eye(20, dtype=int)
    assert distance.min() > 60
    assert min(colorsys.rgb_to_hsv(*(color / 255))[1] for color in colors) > 0.1
    assert np.array_equal(class_colors(5000)[1024:1274], class_colors(250)), "any number of classes, in turn"


def shades(path, color):
    """Pixels of a picture that show a class colour over the white parts of an image."""
    white = 110 + 0.45 * 255
    expected = np.array(color) * 0.62 + white * 0.38
    return int((np.abs(read(path) - expected) <= 2).all(axis=2).sum())


WHITE = np.full((40, 60, 3), 255, dtype=np.uint8)


def test_masks_are_painted_in_the_colours_of_their_classes(tmp_path):
    mask = np.zeros((40, 60), dtype=np.int64)
    mask[:, 45:] = 2
    draw_segmentation(tmp_path / "a.png", WHITE, mask, None, ["sky", "road", "car"])
    sky, road, car = (shades(tmp_path / "a.png", color) for color in class_colors(3))
    assert sky == pytest.approx(3 * car, rel=0.05)
    assert road == 0
    truth = np.full((40, 60), 1)
    draw_segmentation(tmp_path / "b.png", WHITE, mask, truth, ["sky", "road", "car"])
    assert shades(tmp_path / "b.png", class_colors(3)[1]) == pytest.approx(
        4 * shades(tmp_path / "b.png", class_colors(3)[2]), rel=0.1
    )


def test_given_colours_are_used(tmp_path):
    colors = np.array([[250, 10, 10], [10, 10, 250]], dtype=np.uint8)
    draw_segmentation(tmp_path / "a.png", WHITE, np.ones((40, 60), dtype=int), None, ["sky", "road"], colors)
    assert shades(tmp_path / "a.png", colors[1]) > 1000
    assert shades(tmp_path / "a.png", colors[0]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"], "nothing temporary is left"


def test_ignored_pixels_are_striped_and_take_no_colour(tmp_path):
    mask = np.full((40, 60), IGNORE, dtype=np.uint8)
    mask[:, :30] = 1
    draw_segmentation(tmp_path / "a.png", WHITE, mask, None, ["sky", "road"])
    picture = read(tmp_path / "a.png")
    for level in (105, 165):
        assert (picture == level).all(axis=2).sum() > 1000
    assert shades(tmp_path / "a.png", class_colors(2)[0]) == 0
    draw_segmentation(tmp_path / "all.png", WHITE, np.full((40, 60), -1), None, ["sky"], ignore=-1)


def texts(monkeypatch):
    """What the legend says, line by line."""
    from matplotlib.figure import Figure

    lines = []
    plain = Figure.legend

    def legend(self, *args, **kwargs):
        lines.extend(handle.get_label() for handle in kwargs["handles"])
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "legend", legend)
    return lines


def test_the_legend_goes_by_area_and_counts_the_rest(tmp_path, monkeypatch):
    lines = texts(monkeypatch)
    mask = np.repeat(np.arange(24), np.arange(1, 25)).reshape(10, 30)  # class i has i + 1 of 300 pixels
    names = [f"thing {i}" for i in range(150)]
    names[23] = "a name that is far too long for any legend"
    draw_segmentation(tmp_path / "a.png", WHITE[:10, :30], mask, None, names)
    assert len(lines) == 21
    assert lines[0].startswith("a name that is far too long")
    assert lines[0].endswith("\u2026  8.0 %")
    assert lines[1] == "thing 22  7.7 %"
    assert lines[-1] == "4 others"


def test_the_legend_tells_prediction_and_truth_apart(tmp_path, monkeypatch):
    lines = texts(monkeypatch)
    mask, truth = np.zeros((4, 5), dtype=int), np.ones((4, 5), dtype=int)
    mask[0] = 1
    truth[:, 0] = IGNORE
    draw_segmentation(tmp_path / "a.png", WHITE[:4, :5], mask, truth, ["sky", "road"])
    assert lines[:3] == ["road  25.0 / 80.0 %", "sky  75.0 / 0.0 %", "no class  0.0 / 20.0 %"]
    assert "prediction / truth" in lines[3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": np.zeros((40, 61), dtype=int)}, r"the prediction has \(40, 61\) pixels, the image \(40, 60\)"),
        ({"prediction": np.full((40, 60), 2)}, r"the prediction holds 2, which is neither one of 2 classes nor 255"),
        ({"truth": np.full((40, 60), -1)}, r"the truth holds -1"),
        ({"colors": np.zeros((3, 3), dtype=np.uint8)}, r"the colours \(3, 3\) must be \[2, 3\]"),
    ],
)
def test_masks_that_do_not_fit_are_refused(tmp_path, change, message):
    arguments = {"prediction": np.zeros((40, 60), dtype=int), "truth": None} | change
    with pytest.raises(ValueError, match=message):
        draw_segmentation(tmp_path / "a.png", WHITE, class_names=["sky", "road"], **arguments)
    assert not list(tmp_path.iterdir())
