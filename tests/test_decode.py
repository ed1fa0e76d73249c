"""Decoding: odd but valid files give the right pixels, all others one clear reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from nepa_dist.data import decode
from nepa_dist.data.decode import MIN_SIDE, BadImage, decode_image
from nepa_dist.data.turbo import decode_plain_jpeg


def _encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _picture(height: int = 12, width: int = 20) -> NDArray[np.uint8]:
    return np.random.RandomState(1).randint(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_are_exact(kind: str) -> None:
    picture = _picture()
    out = decode_image(_encode(Image.fromarray(picture), kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out, picture)


def test_jpeg_is_pillows_jpeg() -> None:
    data = _encode(Image.fromarray(_picture(40, 60)), "JPEG")
    np.testing.assert_array_equal(decode_image(data), np.asarray(Image.open(io.BytesIO(data))))


JPEG_KINDS: list[dict[str, object]] = [
    {},
    {"quality": 100, "subsampling": 0},
    {"quality": 20, "subsampling": 1},
    {"quality": 90, "subsampling": 2, "optimize": True},
    {"progressive": True},
    {"progressive": True, "subsampling": 0},
    {"restart_marker_rows": 1},
    {"comment": b"\xff\xe1 in a comment", "icc_profile": b"\xff\xd9\xff\xe1" * 20},
    {"dpi": (300, 300)},
]


@pytest.mark.parametrize("options", JPEG_KINDS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(8, 8), (17, 33), (129, 64)])
def test_plain_jpegs_take_the_short_way_and_have_pillows_pixels(
    options: dict[str, object], mode: str, size: tuple[int, int]
) -> None:
    smooth = Image.fromarray(_picture(5, 6)).resize(size, Image.Resampling.BICUBIC).convert(mode)
    if mode == "L":
        options = {key: value for key, value in options.items() if key != "subsampling"}
    data = _encode(smooth, "JPEG", **options)
    pixels = decode_plain_jpeg(data, MIN_SIDE)
    assert pixels is not None
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    np.testing.assert_array_equal(decode_image(data), pixels)


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _encode(Image.fromarray(_picture(16, 24)), "JPEG", exif=exif)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff\xe0\xff\xff" * 4,
        _turned(),
        _encode(Image.fromarray(_picture()), "JPEG", xmp=b"<x:xmpmeta/>"),
        _encode(Image.new("CMYK", (16, 16)), "JPEG"),
        _encode(Image.new("RGB", (16, MIN_SIDE - 1)), "JPEG"),
        _encode(Image.fromarray(_picture()), "JPEG")[:-20],
        _encode(Image.fromarray(_picture()), "PNG"),
    ],
)
def test_the_short_way_leaves_everything_else_to_pillow(data: bytes) -> None:
    assert decode_plain_jpeg(data, MIN_SIDE) is None


def test_a_turned_jpeg_is_upright() -> None:
    assert decode_image(_turned()).shape == (24, 16, 3)


def test_an_image_of_too_many_pixels_is_left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    data = _encode(Image.new("RGB", (40, 40)), "JPEG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1599)
    with pytest.raises(BadImage, match="too large"):
        decode_image(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1600)
    assert decode_image(data).shape == (40, 40, 3)


@pytest.mark.parametrize("progressive", [False, True])
def test_damaged_jpegs_fare_the_same_on_both_ways(progressive: bool) -> None:
    smooth = Image.fromarray(_picture(5, 6)).resize((45, 37), Image.Resampling.BICUBIC)
    data = _encode(smooth, "JPEG", progressive=progressive, quality=85)
    rng = np.random.RandomState(3)
    num_short = 0
    for _ in range(600):
        damaged = bytearray(data)
        for place in rng.randint(0, len(data), rng.randint(1, 3)):
            damaged[place] = rng.choice([0, 0xFF, 0xD9, 0xE1, rng.randint(256)])
        if rng.randint(4) == 0:
            del damaged[rng.randint(len(damaged)) :]
        pixels = decode_plain_jpeg(bytes(damaged), MIN_SIDE)
        if pixels is not None:
            num_short += 1
            np.testing.assert_array_equal(pixels, decode._decode_with_pillow(bytes(damaged)))
    assert 20 < num_short < 580


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_grayscale_becomes_three_equal_channels(mode: str) -> None:
    gray = Image.fromarray(_picture()[..., 0]).convert(mode)
    out = decode_image(_encode(gray))
    np.testing.assert_array_equal(out, np.repeat(np.asarray(gray.convert("L"))[..., None], 3, -1))


def test_sixteen_bit_grayscale_is_scaled_and_not_clipped() -> None:
    values = np.linspace(0, 65535, 12 * 20).astype(np.uint16).reshape(12, 20)
    for kind in ("PNG", "TIFF"):
        out = decode_image(_encode(Image.fromarray(values), kind))
        assert np.abs(out[..., 0] - values / 257.0).max() <= 1
        assert out[0, 0, 0] == 0
        assert out[-1, -1, 0] == 255
        np.testing.assert_array_equal(out[..., 0], out[..., 2])
    exact = np.arange(240, dtype=np.uint16).reshape(12, 20) * 257
    np.testing.assert_array_equal(decode_image(_encode(Image.fromarray(exact)))[..., 1], exact // 257)


def test_cmyk_jpeg() -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    out = decode_image(_encode(red, "JPEG", quality=95))
    assert np.abs(out.astype(int) - (255, 0, 0)).max() < 12


def test_palette_with_transparency_keeps_the_colour_under_it() -> None:
    indices = np.zeros((10, 10), np.uint8)
    indices[:, 5:] = 1
    image = Image.fromarray(indices)
    image.putpalette([10, 20, 30, 200, 100, 50])
    out = decode_image(_encode(image, transparency=bytes([0, 255])))
    assert out[0, 0].tolist() == [10, 20, 30]
    assert out[0, 9].tolist() == [200, 100, 50]


def test_alpha_is_dropped_and_not_composited() -> None:
    picture = _picture()
    alpha = np.zeros((*picture.shape[:2], 1), np.uint8)
    np.testing.assert_array_equal(decode_image(_encode(Image.fromarray(np.concatenate([picture, alpha], -1)))), picture)


# How the stored pixels must be turned to be upright (EXIF 2.3, tag 274), so what a camera would have stored.
STORED = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    upright = _picture()
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode_image(_encode(stored, kind, exif=exif)), upright)


def test_damaged_metadata_does_not_spoil_good_pixels() -> None:
    picture = Image.fromarray(_picture(16, 16))
    clean = decode_image(_encode(picture, "JPEG"))
    np.testing.assert_array_equal(decode_image(_encode(picture, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")), clean)
    np.testing.assert_array_equal(decode_image(_encode(picture, "JPEG", icc_profile=b"nonsense")), clean)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    data = _encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert decode_image(data)[0, 0].tolist() == [255, 0, 0]


def _png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


JPEG = _encode(Image.fromarray(_picture(64, 64)), "JPEG")
PNG = _encode(Image.fromarray(_picture(64, 64)))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"hello, I am a text file\n" * 20, "not an image"),
        (b"<html>404</html>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n", "not an image"),
        (JPEG[:200], "not an image|cannot be decoded"),
        (JPEG[: len(JPEG) // 2], "cannot be decoded: image file is truncated"),
        (PNG[: len(PNG) // 2], "cannot be decoded"),
        (PNG[:100] + bytes(40) + PNG[140:], "cannot be decoded"),
        (_encode(Image.new("RGB", (1, 1))), "1x1 pixels: too small"),
        (_encode(Image.new("RGB", (100, MIN_SIDE - 1))), "100x7 pixels: too small"),
        (_png_header(100_000, 100_000), "too large"),
        (_png_header(10_000, 10_000), "too large"),
        (_encode(Image.fromarray(np.full((9, 9), 0.5, np.float32)), "TIFF"), "floating-point"),
        (_encode(Image.fromarray(np.full((9, 9), 70_000, np.int32)), "TIFF"), "32-bit"),
        (_encode(Image.fromarray(np.full((9, 9), 200, np.int32)), "TIFF"), "32-bit"),
    ],
)
def test_bad_files_have_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        decode_image(data)


def test_the_smallest_side_is_accepted() -> None:
    assert decode_image(_encode(Image.new("RGB", (MIN_SIDE, MIN_SIDE)))).shape == (MIN_SIDE, MIN_SIDE, 3)


@pytest.mark.parametrize("data", [JPEG, PNG, _encode(Image.fromarray(_picture(64, 64)), "TIFF")])
def test_flipped_bytes_never_raise_anything_else(data: bytes) -> None:
    rng = np.random.RandomState(0)
    outcomes = set()
    for _ in range(150):
        damaged = bytearray(data)
        for place in rng.randint(0, min(len(data), 700), 3):
            damaged[place] = rng.randint(256)
        try:
            outcomes.add(decode_image(bytes(damaged)).shape[2])
        except BadImage as error:
            outcomes.add(str(error))
    assert "" not in outcomes
    assert outcomes - {3}
