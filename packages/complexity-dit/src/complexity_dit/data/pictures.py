"""Reading image files: any format of Pillow as upright RGB, and as square training pictures."""

import contextlib
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


def read_picture(file: bytes | Path, resolution: int | None = None) -> Image.Image:
    """Decode an image file into an upright RGB image.

    The EXIF orientation is applied. An animation gives its first frame; transparency is composited
    over white; grey, palette and CMYK become RGB; 16-bit grey keeps its high byte. Embedded colour
    profiles are not applied.

    Args:
        file: The bytes of the file, or its path.
        resolution: Side in pixels of the square the picture will be scaled down to. A smaller
            picture is refused, and a JPEG is decoded at 1/2, 1/4 or 1/8 of its size while its
            shorter side stays at least twice this long. None decodes any picture at full size.

    Raises:
        UserError: Pillow cannot decode the file, the picture is over Pillow's decompression-bomb
            limit (89 megapixels), or a side is smaller than `resolution`.
    """
    with bombs_refused():
        try:
            image = Image.open(BytesIO(file) if isinstance(file, bytes) else file)
            if resolution is not None:
                width, height = image.size
                if min(width, height) < resolution:
                    raise UserError(
                        f"{width}×{height} pixels, smaller than the crop of "
                        f"{resolution}×{resolution}"
                    )
                scale = 2 * resolution / min(width, height)
                image.draft(None, (int(width * scale) + 1, int(height * scale) + 1))
            return _to_rgb(ImageOps.exif_transpose(image))
        except UserError:
            raise
        except UnidentifiedImageError as error:
            raise UserError("is not an image: Pillow cannot identify its format") from error
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


@contextlib.contextmanager
def bombs_refused() -> Iterator[None]:
    """Make Pillow raise for a picture over its limit of 89 megapixels, before decoding it."""
    with warnings.catch_warnings():
        # Pillow's other warnings are about metadata and do not affect the pixels.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it as 8 or 16 bit")
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"grey from {grey.min()} to {grey.max()}; save it as 8 or 16 bit")
        # convert("RGB") would clip everything above 255 to white.
        image = Image.fromarray((grey >> 8).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
