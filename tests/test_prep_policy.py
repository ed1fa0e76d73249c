"""Image policies: what is stored of an image and its mask, and what is repaired on the way."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from data_prep.policy import REPAIRS, BadMask, ImagePolicy, PolicyError, decode_mask
from nepa_dist.data.decode import BadImage, decode_image
from nepa_dist.data.index import ENCODED, RAW


def _pixels(height: int, width: int) -> NDArray[np.uint8]:
    """Smooth colours, so that JPEG changes little."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * x / width, 255 * y / height, 255 - 255 * x / width], axis=2).astype(np.uint8)


def _file(image: Image.Image | NDArray[Any], kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def _turned(orientation: int, size: tuple[int, int] = (40, 60)) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return _file(_pixels(*size), exif=exif)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("keep", "keep"), ("short256", "short256-q90"), ("short256-q90", "short256-q90"), ("short288-q95", "short288-q95"),
        ("raw", "raw"), ("raw256", "raw256"), ("short8-q1", "short8-q1"),
    ],
)  # fmt: skip
def test_policies_have_one_name(text: str, name: str) -> None:
    policy = ImagePolicy.parse(text)
    assert policy.name == name
    assert ImagePolicy.parse(name) == policy


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Keep",
        "short",
        "short7",
        "short256-q0",
        "short256-q101",
        "short256q90",
        "raw256-q90",
        "raw3",
        "keep256",
        "short٣٢",
        "short99999",
    ],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(PolicyError, match="image policy"):
        ImagePolicy.parse(text)


@pytest.mark.parametrize(
    ("size", "stored"),
    [((375, 500), (256, 341)), ((500, 375), (341, 256)), ((256, 900), (256, 900)), ((200, 900), (200, 900)),
     ((257, 257), (256, 256)), ((300, 301), (256, 257)), ((512, 1023), (256, 512))],
)  # fmt: skip
def test_the_shorter_side_is_set_and_nothing_is_enlarged(size: tuple[int, int], stored: tuple[int, int]) -> None:
    assert ImagePolicy.parse("short256").stored_size(*size) == stored
    assert ImagePolicy.parse("raw256").stored_size(*size) == stored
    assert ImagePolicy.parse("keep").stored_size(*size) == size


def test_keep_touches_no_byte() -> None:
    data = _turned(6)
    prepared = ImagePolicy.parse("keep").apply(data)
    assert (prepared.image, prepared.encoding) == (data, ENCODED)
    assert (prepared.height, prepared.width) == (60, 40) == (prepared.source_height, prepared.source_width)
    assert prepared.repairs == ("orientation",)


def test_short_makes_a_smaller_plain_jpeg() -> None:
    source = _pixels(375, 500)
    data = _file(source, quality=97, subsampling=0, comment=b"hello", icc_profile=b"profile" * 9)
    prepared = ImagePolicy.parse("short256").apply(data)
    assert prepared[1:] == (ENCODED, 256, 341, (), 375, 500)
    image = Image.open(io.BytesIO(prepared.image))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (341, 256))
    assert not {"exif", "comment", "icc_profile"} & set(image.info)
    assert [component[1:3] for component in image.layer] == [(2, 2), (1, 1), (1, 1)]  # 4:2:0
    expected = np.asarray(Image.fromarray(decode_image(data)).resize((341, 256), Image.Resampling.LANCZOS), np.int16)
    assert np.abs(decode_image(prepared.image) - expected).mean() < 2
    low = ImagePolicy.parse("short256-q20").apply(data)
    assert len(low.image) < len(prepared.image)


def test_small_images_keep_their_bytes_unless_they_need_a_repair() -> None:
    policy = ImagePolicy.parse("short64")
    plain = _file(_pixels(64, 90), quality=40)
    assert policy.apply(plain).image == plain
    for data, repair in [
        (_file(_pixels(60, 90)[..., 0]), "gray"),
        (_turned(3), "orientation"),
        (_file(_pixels(60, 90), "PNG"), "not-jpeg"),
    ]:
        prepared = policy.apply(data)
        assert prepared.repairs == (repair,)
        assert prepared.image != data
        again = policy.apply(prepared.image)
        assert (again.image, again.repairs) == (prepared.image, ())  # the repaired image is a plain one
        assert again.height == prepared.height
        assert np.abs(decode_image(prepared.image).astype(int) - decode_image(data)).mean() < 3


def test_raw_stores_the_pixels() -> None:
    data = _file(_pixels(100, 80), "PNG")
    prepared = ImagePolicy.parse("raw").apply(data)
    assert prepared[1:] == (RAW, 100, 80, (), 100, 80)
    assert prepared.image == _pixels(100, 80).tobytes()
    small = ImagePolicy.parse("raw40").apply(data)
    assert small[1:4] == (RAW, 50, 40)
    assert len(small.image) == 50 * 40 * 3


def _variants() -> list[tuple[bytes, tuple[str, ...]]]:
    rgb = Image.fromarray(_pixels(40, 60))
    frames = {"save_all": True, "append_images": [Image.fromarray(_pixels(40, 60)[::-1].copy())]}
    deep = np.full((40, 60), 30000, np.uint16)
    return [
        (_file(rgb), ()),
        (_file(rgb.convert("L")), ("gray",)),
        (_file(rgb.convert("CMYK")), ("cmyk",)),
        (_file(rgb.convert("1"), "PNG"), ("not-jpeg", "gray")),
        (_file(rgb.convert("P"), "PNG"), ("not-jpeg", "palette")),
        (_file(rgb.convert("P"), "PNG", transparency=0), ("not-jpeg", "palette", "alpha")),
        (_file(rgb.convert("RGBA"), "PNG"), ("not-jpeg", "alpha")),
        (_file(rgb.convert("LA"), "PNG"), ("not-jpeg", "gray", "alpha")),
        (_file(deep, "PNG"), ("not-jpeg", "gray", "16bit")),
        (_file(deep, "TIFF"), ("not-jpeg", "gray", "16bit")),
        (_file(rgb, "BMP"), ("not-jpeg",)),
        (_file(rgb, "TIFF"), ("not-jpeg",)),
        (_file(rgb.convert("YCbCr"), "TIFF"), ("not-jpeg", "colorspace")),
        (_file(rgb, "GIF", **frames), ("not-jpeg", "animation", "palette")),
        (_file(rgb, "PNG", **frames), ("not-jpeg", "animation")),
        (_file(rgb, "MPO", **frames), ("animation",)),
        (_turned(1), ()),
        (_turned(8), ("orientation",)),
        (_turned(9), ()),
    ]


@pytest.mark.parametrize("number", range(len(_variants())))
def test_repairs_are_named_and_the_result_is_plain(number: int) -> None:
    data, repairs = _variants()[number]
    assert set(repairs) <= set(REPAIRS)
    short = ImagePolicy.parse("short32").apply(data)
    assert short.repairs == repairs
    plain = Image.open(io.BytesIO(short.image))
    assert (plain.format, plain.mode, min(plain.size)) == ("JPEG", "RGB", 32)
    for text in ("keep", "raw"):
        prepared = ImagePolicy.parse(text).apply(data)
        assert prepared.repairs == tuple(repair for repair in repairs if repair != "not-jpeg")
        pixels = decode_image(data)
        assert (prepared.height, prepared.width) == pixels.shape[:2]
    assert prepared.image == pixels.tobytes()


def test_what_cannot_be_used_is_a_bad_image() -> None:
    whole = _file(_pixels(100, 100))
    for text in ("keep", "short32", "raw"):
        for data in (b"", b"text", whole[: len(whole) // 2], _file(_pixels(4, 4))):
            with pytest.raises(BadImage):
                ImagePolicy.parse(text).apply(data)
    long = _file(np.zeros((8, 65600, 3), np.uint8), "PNG")
    with pytest.raises(BadImage, match="65600x8 pixels: a side longer than 65500"):
        ImagePolicy.parse("keep").apply(long)


def test_the_same_bytes_every_time() -> None:
    data, mask = _file(_pixels(90, 70)), _file(np.arange(6300, dtype=np.uint8).reshape(90, 70), "PNG")
    for text in ("keep", "short32-q80", "raw32"):
        policy = ImagePolicy.parse(text)
        first = policy.apply(data)
        assert policy.apply(data) == first
        assert policy.apply_mask(mask, first.height, first.width) == policy.apply_mask(mask, first.height, first.width)


def _mask_files(values: NDArray[np.uint8]) -> dict[str, bytes]:
    palette = Image.fromarray(values)
    palette.putpalette([(7 * k) % 256 for k in range(768)])  # colours that are no labels
    return {"gray": _file(values, "PNG"), "16bit": _file(values.astype(np.uint16), "PNG"), "palette": _file(palette, "PNG")}


@pytest.mark.parametrize("form", ["gray", "16bit", "palette"])
def test_masks_follow_their_image_pixel_by_pixel(form: str) -> None:
    regions = np.zeros((300, 451), np.uint8)
    regions[:150], regions[150:, 200:], regions[100:200, 50:90] = 1, 2, 5
    data = _file(np.repeat(regions[..., None] * 40, 3, axis=2), quality=95)
    policy = ImagePolicy.parse("short128")
    image = policy.apply(data)
    stored = policy.apply_mask(_mask_files(regions)[form], image.height, image.width, source_size=(300, 451), num_classes=5)
    labels = decode_mask(stored)
    assert labels.shape == (128, 192) == (image.height, image.width)
    assert set(np.unique(labels)) == {0, 1, 2, 5}
    # The gray level of the image is 40 x label, but for ringing beside the borders.
    assert np.mean(np.abs(decode_image(image.image)[..., 0] / 40 - labels) < 0.5) > 0.98
    kept = _mask_files(regions)[form]
    assert ImagePolicy.parse("keep").apply_mask(kept, 300, 451) == kept
    assert np.array_equal(decode_mask(kept), regions)


def test_labels_beyond_255_survive() -> None:
    values = (np.arange(64 * 64).reshape(64, 64) % 3000).astype(np.uint16)
    stored = decode_mask(ImagePolicy.parse("short32").apply_mask(_file(values, "PNG"), 32, 32, num_classes=3000))
    assert stored.dtype == np.uint16
    assert stored.max() > 2000
    assert np.isin(stored, values).all()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_file(_pixels(16, 16), "PNG"), "the mask has RGB colours"),
        (_file(Image.new("RGBA", (16, 16)), "PNG"), "RGB colours with transparency"),
        (_file(Image.new("LA", (16, 16)), "PNG"), "grey with transparency"),
        (_file(Image.new("1", (16, 16)), "PNG"), "grey values of 1 bits"),
        (_file(_pixels(16, 16)[..., 0]), "the mask is no PNG"),
        (b"", "the mask is no PNG"),
        (_file(np.zeros((16, 16), np.uint8), "PNG")[:-30], "cannot be decoded"),
        (_file(np.zeros((16, 17), np.uint8), "PNG"), "the mask has 17x16 pixels, which does not fit the stored 16x16"),
        (_file(np.full((16, 16), 7, np.uint8), "PNG"), "the label 7 at 256 pixels; the class table ends at 6"),
    ],
)  # fmt: skip
def test_masks_that_cannot_be_used(data: bytes, message: str) -> None:
    with pytest.raises(BadMask, match=message):
        ImagePolicy.parse("keep").apply_mask(data, 16, 16, num_classes=6)


def test_what_counts_as_a_label() -> None:
    mask = _file(np.array([[0, 1, 6, 255] * 4] * 16, np.uint8), "PNG")
    assert ImagePolicy.parse("keep").apply_mask(mask, 16, 16, num_classes=6) == mask


def test_a_mask_of_another_resolution_is_refused_where_the_source_size_is_known() -> None:
    policy, half = ImagePolicy.parse("short32"), _file(np.zeros((50, 50), np.uint8), "PNG")
    assert decode_mask(policy.apply_mask(half, 32, 32)).shape == (32, 32)
    with pytest.raises(BadMask, match="the mask has 50x50 pixels, its image 100x100"):
        policy.apply_mask(half, 32, 32, source_size=(100, 100))
