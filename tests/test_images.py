"""Pictures as they come: each read as an independent reading has it, or refused with a reason."""

import io
import os
import socket
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from models.encoders import images
from models.encoders.images import FORMATS, UPRIGHT, UnreadableImage, read_image

RANDOM = np.random.default_rng(7)
COLOUR = RANDOM.integers(0, 256, (12, 17, 3), dtype=np.uint8)
GREY = COLOUR[:, :, 0]
DEEP = RANDOM.integers(0, 65536, (12, 17, 3), dtype=np.uint16)


def encoded(image, file_format, **options):
    """A PIL picture or an array → the bytes of a file."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def tiff(pixels, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()


def png_of_16_bits(pixels):
    """Write a PNG by hand: PIL cannot write 16-bit colour. pixels: [H, W, C] uint16."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def pixels_of(source):
    image = read_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)


def three(grey):
    return np.repeat(grey[:, :, None], 3, 2)


def from_16_bits(pixels):
    return np.floor(pixels / 257 + 0.5).astype(np.uint8)


def test_eight_bit_files_are_read_exactly():
    for file_format in ("PNG", "BMP", "TIFF", "PPM"):
        assert (pixels_of(encoded(COLOUR, file_format)) == COLOUR).all()
        assert (pixels_of(encoded(GREY, file_format)) == three(GREY)).all()
    assert (pixels_of(encoded(COLOUR, "WEBP", lossless=True)) == COLOUR).all()
    assert (pixels_of(encoded(GREY > 127, "PNG")) == three((GREY > 127) * np.uint8(255))).all()
    assert (pixels_of(tiff(COLOUR, photometric="rgb", compression="deflate")) == COLOUR).all()


def test_an_ordinary_jpeg_is_what_pil_makes_of_it_from_path_bytes_or_picture(tmp_path):
    data = encoded(COLOUR, "JPEG", quality=90)
    path = tmp_path / "photo with space \n ü.JPG"
    path.write_bytes(data)
    expected = np.asarray(Image.open(io.BytesIO(data)))
    for source in (data, path, str(path), Image.open(path), bytearray(data)):
        assert (pixels_of(source) == expected).all()


def test_cmyk_palette_and_transparency_become_the_colours_pil_gives():
    cmyk = Image.fromarray(COLOUR).convert("CMYK")
    assert (pixels_of(encoded(cmyk, "TIFF")) == np.asarray(cmyk.convert("RGB"))).all()
    jpeg = encoded(cmyk, "JPEG")
    assert (pixels_of(jpeg) == np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))).all()
    palette = Image.fromarray(COLOUR).quantize(32)
    assert (pixels_of(encoded(palette, "PNG")) == np.asarray(palette.convert("RGB"))).all()
    assert (pixels_of(encoded(palette, "PNG", transparency=bytes(range(32)))) == np.asarray(palette.convert("RGB"))).all()
    assert (pixels_of(encoded(palette, "GIF", transparency=3)) == np.asarray(palette.convert("RGB"))).all()
    alpha = RANDOM.integers(0, 256, (12, 17, 1), dtype=np.uint8)
    assert (pixels_of(encoded(np.concatenate([COLOUR, alpha], 2), "PNG")) == COLOUR).all(), "colours are kept, alpha is dropped"
    assert (pixels_of(encoded(Image.fromarray(np.dstack([GREY, alpha])), "PNG")) == three(GREY)).all()


def test_sixteen_bits_are_divided_by_257():
    expected = from_16_bits(DEEP)
    assert (pixels_of(encoded(DEEP[:, :, 0], "PNG")) == three(expected[:, :, 0])).all()
    assert (pixels_of(png_of_16_bits(DEEP)) == expected).all()
    assert (pixels_of(png_of_16_bits(np.dstack([DEEP, DEEP[:, :, :1]]))) == expected).all()
    assert (pixels_of(png_of_16_bits(DEEP[:, :, :2])) == three(expected[:, :, 0])).all(), "grey with alpha"
    assert (pixels_of(tiff(DEEP[:, :, 0])) == three(expected[:, :, 0])).all()
    assert (pixels_of(tiff(DEEP[:, :, 0], byteorder=">")) == three(expected[:, :, 0])).all()
    assert (pixels_of(tiff(DEEP[:, :, 0], bigtiff=True)) == three(expected[:, :, 0])).all()
    assert (pixels_of(tiff(DEEP[:, :, 0], photometric="miniswhite")) == 255 - three(expected[:, :, 0])).all()
    assert (pixels_of(encoded(DEEP[:, :, 0], "TIFF", compression="tiff_lzw")) == three(expected[:, :, 0])).all()
    assert (pixels_of(tiff(DEEP, photometric="rgb")) == expected).all()
    assert (pixels_of(tiff(DEEP, photometric="rgb", byteorder=">", compression="deflate")) == expected).all()
    assert (pixels_of(tiff(np.moveaxis(DEEP, 2, 0), photometric="rgb", planarconfig="separate")) == expected).all()
    assert (pixels_of(Image.fromarray(DEEP[:, :, 0])) == three(expected[:, :, 0])).all()
    assert (pixels_of(Image.fromarray(DEEP[:, :, 0].astype(np.int32))) == three(expected[:, :, 0])).all()


def test_floats_within_0_and_1_are_multiplied_others_are_stretched():
    unit = RANDOM.random((12, 17, 3)).astype(np.float32)
    expected = np.floor(unit.astype(np.float64) * 255 + 0.5).astype(np.uint8)
    assert (pixels_of(tiff(unit[:, :, 0])) == three(expected[:, :, 0])).all()
    assert (pixels_of(encoded(unit[:, :, 0], "TIFF", compression="tiff_lzw")) == three(expected[:, :, 0])).all()
    assert (pixels_of(tiff(unit, photometric="rgb")) == expected).all()
    assert (pixels_of(tiff(unit.astype(np.float64), photometric="rgb")) == expected).all()
    wide = unit[:, :, 0] * 900 - 300
    stretched = np.interp(wide.astype(np.float64), (wide.min(), wide.max()), (0, 255))
    assert np.abs(pixels_of(tiff(wide))[:, :, 0] - stretched).max() <= 0.5001
    with_gaps = wide.copy()
    with_gaps[0, 0], with_gaps[5, 5] = np.nan, np.inf
    assert pixels_of(tiff(with_gaps))[0, 0, 0] == 0
    assert pixels_of(tiff(with_gaps)).max() == 255
    assert pixels_of(tiff(np.full((3, 4), 7, np.float32))).max() == 0, "one value only, outside 0 … 1"
    signed = (DEEP[:, :, 0].astype(np.int32) - 30000).astype(np.int16)
    stretched = np.interp(signed, (signed.min(), signed.max()), (0, 255))
    assert np.abs(pixels_of(tiff(signed))[:, :, 0] - stretched).max() <= 0.5001


def test_all_eight_orientations_come_out_upright(tmp_path):
    # How a camera stores an upright picture under each orientation value (EXIF 2.32, tag 0x0112).
    stored_as = {
        1: COLOUR, 2: COLOUR[:, ::-1], 3: COLOUR[::-1, ::-1], 4: COLOUR[::-1], 5: COLOUR.transpose(1, 0, 2),
        6: COLOUR.transpose(1, 0, 2)[::-1], 7: COLOUR.transpose(1, 0, 2)[::-1, ::-1], 8: COLOUR.transpose(1, 0, 2)[:, ::-1],
    }  # fmt: skip
    assert set(stored_as) == {1, *UPRIGHT}
    for orientation, stored in stored_as.items():
        stored = np.ascontiguousarray(stored)
        exif = Image.Exif()
        exif[0x0112] = orientation
        assert (pixels_of(encoded(stored, "PNG", exif=exif)) == COLOUR).all()
        assert (pixels_of(encoded(stored, "TIFF", exif=exif)) == COLOUR).all()
        assert (pixels_of(tiff(stored * np.uint16(257), photometric="rgb", extratags=[(274, 3, 1, orientation, True)])) == COLOUR).all()
        jpeg = encoded(np.kron(stored, np.ones((8, 8, 1), np.uint8)), "JPEG", exif=exif, quality=95, subsampling=0)
        assert np.abs(pixels_of(jpeg)[4::8, 4::8].astype(int) - COLOUR).max() < 8
        assert (pixels_of(Image.open(io.BytesIO(encoded(stored, "PNG", exif=exif)))) == COLOUR).all()
    broken = encoded(COLOUR, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    assert (pixels_of(broken) == pixels_of(encoded(COLOUR, "JPEG"))).all()


def test_the_first_frame_of_an_animation_and_the_first_page_of_a_tiff_are_taken():
    frames = [Image.fromarray(np.full((6, 8, 3), shade, np.uint8)) for shade in (200, 20, 90)]
    for file_format in ("GIF", "PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if file_format == "WEBP" else {}
        data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
        assert (pixels_of(data) == 200).all(), file_format
    assert (pixels_of(tiff(np.stack([DEEP, DEEP[::-1]]), photometric="rgb")) == from_16_bits(DEEP)).all()


def test_one_pixel_very_long_and_lying_suffixes_are_read(tmp_path):
    assert pixels_of(encoded(COLOUR[:1, :1], "PNG")).shape == (1, 1, 3)
    long = RANDOM.integers(0, 256, (10, 8000, 3), dtype=np.uint8)
    assert (pixels_of(encoded(long, "PNG")) == long).all()
    liar = tmp_path / "picture.jpg"
    liar.write_bytes(encoded(COLOUR, "PNG"))
    assert (pixels_of(liar) == COLOUR).all()
    (tmp_path / "UPPER.PNG").write_bytes(encoded(COLOUR, "PNG"))
    assert (pixels_of(tmp_path / "UPPER.PNG") == COLOUR).all()
    longest_name = tmp_path / ("ä" * 125 + "x.png")
    longest_name.write_bytes(encoded(COLOUR, "PNG"))
    assert (pixels_of(longest_name) == COLOUR).all()


def test_what_cannot_be_read_says_why(tmp_path):
    jpeg, png = encoded(COLOUR, "JPEG"), encoded(RANDOM.integers(0, 256, (80, 80, 3), dtype=np.uint8), "PNG")
    (tmp_path / "empty.jpg").write_bytes(b"")
    bomb = png_of_16_bits(np.zeros((1, 1, 3), np.uint16))
    header = b"IHDR" + struct.pack(">II", 100_000, 1800) + bomb[24:29]  # it says 100,000 x 1,800 pixels
    bomb = bomb[:12] + header + struct.pack(">I", zlib.crc32(header)) + bomb[33:]
    for source, reason in (
        (tmp_path / "empty.jpg", "zero bytes"),
        (b"", "zero bytes"),
        (tmp_path / "nowhere.jpg", "no such file"),
        (tmp_path, "a folder; expected a regular file"),
        ("https://example.org/cat.jpg", "a URL, not a file: download it first"),
        (Path("https://example.org/cat.jpg"), "a URL, not a file: download it first"),
        (b"<html>404</html>", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not a picture"),
        (jpeg[: len(jpeg) * 2 // 3], "(?i)truncated"),
        (png[: len(png) // 2], "cannot be read"),
        (tiff(DEEP, photometric="rgb")[:200], "cannot be read"),
        (tiff(DEEP, photometric="rgb")[:-300], "cannot be read"),
        (tiff(DEEP, photometric="rgb", rowsperstrip=2)[:-300], "cannot be read"),
        (tiff(DEEP.astype(np.float32), photometric="rgb", rowsperstrip=2)[:-300], "cannot be read"),
        (tiff(DEEP[:, :, 0])[:-100], "cannot be read"),
        (bomb, "bomb"),
    ):
        with pytest.raises(UnreadableImage, match=reason) as caught:
            read_image(source)
        assert "\n" not in str(caught.value)
    with pytest.raises(TypeError):
        read_image(3)


WHOLE = [
    encoded(COLOUR, "JPEG"), encoded(COLOUR, "PNG"), encoded(COLOUR, "GIF"), encoded(COLOUR, "WEBP"), png_of_16_bits(DEEP),
    tiff(DEEP, photometric="rgb"), tiff(DEEP[:, :, 0].astype(np.float32)), encoded(COLOUR, "BMP"),
]  # fmt: skip


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.sampled_from(WHOLE), st.integers(0, 4000), st.binary(min_size=1, max_size=8), st.integers(0, 4000))
def test_a_damaged_file_gives_a_picture_or_the_reason(data, at, bytes_put, cut):
    at %= len(data)
    damaged = data[:at] + bytes_put + data[at + len(bytes_put) :]
    damaged = damaged[: len(data) - cut % len(data)] if cut % 3 == 0 else damaged
    try:
        assert read_image(damaged).mode == "RGB"
    except UnreadableImage as error:
        assert str(error)


def test_every_format_has_a_reader():
    Image.init()
    assert set(FORMATS) <= set(Image.OPEN)


@pytest.mark.parametrize("least, size", [(None, (1200, 900)), (901, (1200, 900)), (450, (600, 450)), (226, (600, 450)), (225, (300, 225))])
def test_a_jpeg_may_come_out_smaller_but_no_side_below_the_least(tmp_path, least, size):
    for suffix in ("jpg", "png"):
        Image.new("RGB", (1200, 900), (200, 10, 10)).save(tmp_path / f"a.{suffix}")
        assert read_image(tmp_path / f"a.{suffix}", least).size == (size if suffix == "jpg" else (1200, 900))


def test_many_threads_read_at_once(monkeypatch):
    """Large images are read without warnings in every thread, and the filters are as they were once all have left."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)  # PIL warns from here on, and refuses twice as many
    large, bomb = encoded(np.zeros((30, 40), np.uint8), "PNG"), encoded(np.zeros((40, 40), np.uint8), "PNG")

    def read(number):
        try:
            return read_image((large, bomb, encoded(COLOUR, "PNG"))[number % 3]).size
        except UnreadableImage as error:
            return str(error)[:15]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(read, range(300)))
        assert warnings.filters == before
    assert found == [(40, 30), "too many pixels", (17, 12)] * 100


def test_a_phone_picture_of_more_than_89_million_pixels_is_read():
    assert read_image(encoded(Image.new("L", (12_000, 9_000), 200), "JPEG"), 256).size == (1500, 1125)


def test_a_fifo_or_socket_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "fifo.jpg")
    with pytest.raises(UnreadableImage, match="a FIFO; expected a regular file"):
        read_image(tmp_path / "fifo.jpg")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "s.jpg"))
    with pytest.raises(UnreadableImage, match="a socket; expected a regular file"):
        read_image(tmp_path / "s.jpg")
    listening.close()


def test_deep_pixels_are_scaled_alike_in_one_block_and_in_many(monkeypatch):
    for pixels in (DEEP, DEEP.astype(np.float32) / 65535, DEEP.astype(np.int64) - 9, np.where(DEEP > 60000, np.nan, DEEP)):
        whole = images._to_eight_bits(pixels)
        monkeypatch.setattr(images, "BLOCK", 7)
        assert (images._to_eight_bits(pixels) == whole).all()
        monkeypatch.undo()
