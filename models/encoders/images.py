"""Read any image file as an upright 8-bit RGB image, or raise UnreadableImage with the reason.

PIL reads ordinary images and converts them to RGB as CLIP's own preprocessing does: transparency is dropped, not blended, so that
features agree with everybody else's. What PIL would clip or round (16-bit colour, float, 32-bit) is scaled here:

    unsigned 16-bit                 value / 257, rounded; wider integers count as 16-bit where all values fit
    float from 0 to 1               value x 255, rounded
    any other float or integer      stretched, smallest value to 0 and largest to 255; NaN and infinities become 0

Suffixes are ignored: the content decides. Animations give their first frame. EPS is not opened: it is a program.
"""

import io
import os
import re
import stat
import threading
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from common import KINDS
from models.tensors import READ_ERRORS

# Ordinary formats first: PIL loads its rarer readers only when it needs them.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP", "AVIF", "JPEG2000", "DIB")
TIFF_BEGINNINGS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")  # one channel of more than 8 bits, which PIL reads exactly
ORIENTATION = 274  # the tag's number in EXIF and in TIFF
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
DAMAGED = (*READ_ERRORS, Image.DecompressionBombError)
URL = re.compile(r"(?i)[a-z][a-z0-9+.-]+:/{1,2}\S")  # pathlib makes one slash of two
BLOCK = 2**20  # numbers scaled to eight bits together


class UnreadableImage(ValueError):
    """An image that cannot be read. The message is the reason, without the path."""


class _NoWarnings:
    """Ignore warnings about odd EXIF and large images, which are common among a hundred thousand images.

    This is warnings.catch_warnings for several threads at once: the first to enter sets the filters, the last to leave restores them.
    """

    def __init__(self):
        self.lock, self.inside = threading.Lock(), 0

    def __enter__(self):
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                self.caught = warnings.catch_warnings()
                self.caught.__enter__()
                warnings.simplefilter("ignore")

    def __exit__(self, *_):
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.caught.__exit__(None, None, None)


_NO_WARNINGS = _NoWarnings()


def read_image(source, least_side=None):
    """Read an image.

    Args:
        source: a path, the bytes of a file, or a PIL image.
        least_side: decode a JPEG at half, a quarter or an eighth of its size, as long as no side has fewer pixels than this.
            libjpeg's scaled decoding is several times faster, and gives slightly different pixels than scaling the whole.

    Returns:
        PIL image, RGB, upright.

    Raises:
        UnreadableImage: a missing or empty file, one that is no image or is damaged, or one with more pixels than PIL thinks safe
            (twice Image.MAX_IMAGE_PIXELS: about 179 million). A FIFO, socket or device is refused unopened.
    """
    if not isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)):
        raise TypeError(f"an image is a path, bytes or a PIL image, not a {type(source).__name__}")
    with _NO_WARNINGS:
        try:
            if isinstance(source, Image.Image):
                return _upright_rgb(source)
            data = _read_file(source) if isinstance(source, (str, os.PathLike)) else bytes(source)
            if not data:
                raise UnreadableImage("empty: zero bytes")
            return _decode(data, least_side)
        except UnreadableImage:
            raise
        except Image.DecompressionBombError as error:
            raise UnreadableImage(f"too many pixels: more than {2 * Image.MAX_IMAGE_PIXELS}, as in a decompression bomb") from error
        except Image.UnidentifiedImageError as error:
            raise UnreadableImage("not a picture in a known format") from error
        except DAMAGED as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise UnreadableImage(f"cannot be read: {' '.join(reason.split())}") from error


def _read_file(path):
    """Read a regular file; opening a FIFO would wait for a writer that may never come."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        if URL.match(os.fspath(path)):
            raise UnreadableImage("a URL, not a file: download it first (wget or curl -O) and give the file") from error
        raise UnreadableImage("no such file") from error
    if not stat.S_ISREG(mode):
        raise UnreadableImage(f"{KINDS.get(stat.S_IFMT(mode), 'something else')}; expected a regular file")
    return Path(path).read_bytes()


def _decode(data, least_side=None):
    """Decode the bytes of an image file as upright RGB. Raises whatever its reader raises."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        if data[:4] in TIFF_BEGINNINGS:  # float colour, 64-bit float and others unknown to PIL
            return _read_tiff(data)
        raise
    if least_side and image.format == "JPEG":
        image.draft(None, (least_side, least_side))
    if image.format == "PNG" and data[24] == 16 and image.mode not in DEEP_MODES:
        return _turn(_read_colour_png(data), _orientation(image))
    if image.format == "TIFF" and max(image.tag_v2.get(258, (1,))) > 8 and image.mode not in DEEP_MODES:
        try:
            return _read_tiff(data)
        except ValueError:
            pass  # this compression needs PIL's reader, which keeps the high byte: exact to one level in 255
    return _upright_rgb(image)


def _upright_rgb(image):
    """Convert a PIL image in any mode to RGB, turned as its EXIF orientation says."""
    white_is_zero = image.format == "TIFF" and image.mode in DEEP_MODES and image.tag_v2.get(262) == 0
    image.load()
    orientation = _orientation(image)
    if image.mode in DEEP_MODES:
        image = _from_array(np.asarray(image), inverted=white_is_zero)
    elif image.mode in ("P", "PA"):
        image = image.convert("RGBA").convert("RGB")
    elif image.mode != "RGB":
        image = image.convert("RGB")
    return _turn(image, orientation)


def _orientation(image):
    """The EXIF orientation of a PIL image, 1 to 8; 1 where there is none or it cannot be read."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except DAMAGED:
        return 1  # damaged EXIF does not make an image unreadable


def _turn(image, orientation):
    method = UPRIGHT.get(orientation)
    return image if method is None else image.transpose(method)


def _read_colour_png(data):
    """Read a PNG of several 16-bit channels, of which PIL keeps the high byte only, as RGB, not yet turned."""
    import torch
    from torchvision.io import decode_png

    pixels = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8))  # [C, H, W] uint16
    return _from_array(pixels.permute(1, 2, 0).numpy())


def _read_tiff(data):
    """Read the first page of a TIFF by tifffile as upright RGB."""
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        if page.imagewidth * page.imagelength > 2 * Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError
        pixels, axes = page.asarray(), page.axes
        tag = page.tags.get(ORIENTATION)
        inverted, subtractive = page.photometric == 0, page.photometric == 5
    if axes not in ("YX", "YXS", "SYX"):
        raise UnreadableImage(f"a TIFF with axes {axes}, expected rows, columns and channels")
    if axes == "SYX":
        pixels = np.moveaxis(pixels, 0, 2)  # [H, W, C]
    return _turn(_from_array(pixels, inverted, subtractive), tag.value if tag else 1)


def _from_array(pixels, inverted=False, subtractive=False):
    """Make an RGB image of numbers of any type, [H, W] or [H, W, C]. inverted: 0 is white; subtractive: the channels are CMYK."""
    pixels = _to_eight_bits(pixels)
    if inverted:
        pixels = 255 - pixels
    if pixels.ndim == 3 and pixels.shape[2] < 3:
        pixels = pixels[:, :, 0]  # grey, or grey with alpha
    if subtractive and pixels.ndim == 3 and pixels.shape[2] >= 4:
        return Image.fromarray(np.ascontiguousarray(pixels[:, :, :4]), mode="CMYK").convert("RGB")
    return Image.fromarray(np.ascontiguousarray(pixels[:, :, :3] if pixels.ndim == 3 else pixels)).convert("RGB")


def _to_eight_bits(pixels):
    """Scale numbers of any type to uint8 by the rules at the top of this file."""
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype.kind not in "biuf":
        raise UnreadableImage(f"pixels of type {pixels.dtype}, expected integers or floats")
    flat = np.ascontiguousarray(pixels).reshape(-1)
    blocks = [slice(start, start + BLOCK) for start in range(0, len(flat), BLOCK)]  # 64-bit floats of all of it would fill the memory
    finite = (flat[block][np.isfinite(flat[block])] for block in blocks)
    ends = [(float(values.min()), float(values.max())) for values in finite if len(values)] or [(0.0, 0.0)]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    from_0_to_1 = pixels.dtype.kind in "bf" and low >= 0 and high <= 1
    sixteen_bits = pixels.dtype.kind in "iu" and pixels.dtype.itemsize > 1 and low >= 0 and high <= 65535
    result = np.empty(len(flat), np.uint8)
    for block in blocks:
        values = flat[block].astype(np.float64)
        values = np.where(np.isfinite(values), values, low)
        if from_0_to_1:
            scaled = values * 255
        elif sixteen_bits:
            scaled = values / 257
        else:
            scaled = (values - low) / max(high - low, np.finfo(np.float64).tiny) * 255
        result[block] = np.rint(np.where(np.isfinite(flat[block]), scaled, 0)).clip(0, 255).astype(np.uint8)
    return result.reshape(pixels.shape)
