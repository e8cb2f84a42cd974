"""The reader of pictures: image files and PIL images as upright RGB, for every part of the package.

No other module of the packages opens an image file (`tests/repo/test_workspace.py`).
"""

import contextlib
import struct
import warnings
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms.v2 import functional as F

from inl_core.run.errors import UserError

VERSION = 1
"""Part of every cache key and fingerprint: raise it when `square_pixels` changes its output."""

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000")
"""Formats that are opened, by content. Pillow knows 40 more, some of which start programs."""

MAX_FILE_BYTES = 2**29
"""Of one picture, also unpacked from an archive."""

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".tif", ".tiff", ".bmp", ".dib",
     ".gif", ".avif", ".avifs", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"}
)  # fmt: skip
"""Endings, in lower case, of the files of a folder that count as pictures."""


def read_picture(file: bytes | Path, resolution: int | None = None) -> Image.Image:
    """Decode an image file into an upright RGB image, as `upright_rgb` does.

    An animation or a file of several pages gives its first picture. Texts and colour profiles of a
    PNG may have any size.

    Args:
        file: The bytes of the file, or its path.
        resolution: Side in pixels of the square the picture will be scaled down to. A smaller
            picture is refused, and a JPEG is decoded at 1/2, 1/4 or 1/8 of its size while its
            shorter side stays at least twice this long. None decodes any picture at full size.

    Raises:
        UserError: The file is of none of the `FORMATS` or cannot be decoded, the picture is over
            Pillow's decompression-bomb limit (89 megapixels), or a side is smaller than
            `resolution`.
    """
    with _plain_errors():
        data = file if isinstance(file, bytes) else file_bytes(file)
        try:
            return _decode(data, resolution)
        except ValueError:
            # Pillow has limits for texts and profiles, neither of which changes the pixels.
            if (shorter := _without_texts(data)) == data:
                raise
            return _decode(shorter, resolution)


def file_bytes(path: Path) -> bytes:
    """Read a regular file of at most `MAX_FILE_BYTES`, or raise a `UserError` without its name."""
    if not path.is_file():
        raise UserError("is not a file" if path.exists() else "is not there")
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise UserError(f"has {size} bytes, and at most {MAX_FILE_BYTES} are read")
    return path.read_bytes()


def _decode(data: bytes, resolution: int | None) -> Image.Image:
    Image.init()
    # Pillow may be built without one of them, and would raise KeyError.
    formats = [name for name in FORMATS if name in Image.OPEN]
    with Image.open(BytesIO(data), formats=formats) as image:
        if resolution is not None:
            width, height = image.size
            if min(width, height) < resolution:
                raise UserError(
                    f"{width}×{height} pixels, smaller than the crop of {resolution}×{resolution}"
                )
            scale = 2 * resolution / min(width, height)
            image.draft(None, (int(width * scale) + 1, int(height * scale) + 1))
        return upright_rgb(image)


def _without_texts(data: bytes) -> bytes:
    """A PNG without its texts and its colour profile; any other file as it is."""
    at = 8
    if data[:at] != b"\x89PNG\r\n\x1a\n":
        return data
    kept = [data[:at]]
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if kind not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def upright_rgb(image: Image.Image) -> Image.Image:
    """Convert a PIL image of any mode into upright RGB.

    The EXIF orientation is applied; transparency is composited over white; grey, palette and CMYK
    become RGB; 16-bit grey keeps its high byte. Embedded colour profiles are not applied.

    Raises:
        UserError: The image is not yet decoded and cannot be, or its values have no known range.
    """
    with _plain_errors():
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise UserError("has floating-point pixels of no known range; save it as 8 or 16 bit")
        if image.mode == "I" or image.mode.startswith("I;16"):
            grey = np.asarray(image).astype(np.int64)
            if grey.min() < 0 or grey.max() > 65535:
                raise UserError(f"has grey from {grey.min()} to {grey.max()}; save it as 16 bit")
            if isinstance(clear := image.info.get("transparency"), int):
                grey[grey == clear] = 65535
            # convert("RGB") would clip everything above 255 to white.
            image = Image.fromarray((grey >> 8).astype(np.uint8))
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        return image.convert("RGB")


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise a `UserError` for whatever Pillow raises, and for a picture over its limit."""
    try:
        with warnings.catch_warnings():
            # Pillow's other warnings are about metadata and do not affect the pixels.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"is not an image of a known format ({', '.join(FORMATS)})") from error
    # On broken bytes Pillow's parsers raise almost anything: OSError, SyntaxError, KeyError,
    # struct.error, …
    except Exception as error:
        message = str(error).splitlines()[0] if str(error) else "no message"
        raise UserError(f"cannot be decoded ({type(error).__name__}: {message})") from error


def square_pixels(data: bytes, resolution: int) -> np.ndarray:
    """Decode an image file and scale its largest centred square with an antialiased Lanczos filter.

    Args:
        data: The bytes of the file.
        resolution: Side of the result in pixels.

    Returns:
        uint8 of shape (3, resolution, resolution), RGB.

    Raises:
        UserError: As `read_picture`.
    """
    rgb = read_picture(data, resolution)
    side = min(rgb.size)
    left, top = (rgb.width - side) / 2, (rgb.height - side) / 2
    # Not `center_crop` and `resize` of torchvision: they round the box to whole pixels and cut the
    # filter off at its border, and the bits of every prepared picture would change.
    square = rgb.resize(
        (resolution, resolution),
        Image.Resampling.LANCZOS,
        box=(left, top, left + side, top + side),
        reducing_gap=3.0,
    )
    return F.pil_to_tensor(square).numpy()


def whole_pixels(data: bytes, resolution: int) -> np.ndarray:
    """Decode an image file and scale its shorter side, with the filter of `square_pixels`.

    Args:
        data: The bytes of the file.
        resolution: Length of the shorter side of the result in pixels.

    Returns:
        uint8 of shape (3, Y, X), RGB.

    Raises:
        UserError: As `read_picture`.
    """
    rgb = read_picture(data, resolution)
    width, height = (round(side * resolution / min(rgb.size)) for side in rgb.size)
    whole = rgb.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return F.pil_to_tensor(whole).numpy()
