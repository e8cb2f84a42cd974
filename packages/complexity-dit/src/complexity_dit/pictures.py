"""Pictures and masks that a user hands to a pipeline, in any form that diffusers takes."""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from inl_core.run.errors import UserError

Picture = Image.Image | np.ndarray | Tensor
Pictures = Picture | Sequence[Picture]

# Numbers of channels that none has: tensors of latents are not asked for here.
_PIXELS = VaeImageProcessor(vae_scale_factor=1, do_convert_rgb=True, vae_latent_channels=0)
_MASKS = VaeImageProcessor(
    vae_scale_factor=1, do_normalize=False, do_binarize=True, do_convert_grayscale=True,
    vae_latent_channels=0,
)  # fmt: skip


def read_pictures(image: Pictures, height: int | None, width: int | None) -> Tensor:
    """Pictures as (B, 3, Y, X) in [-1, 1].

    Args:
        image: One or several: PIL, arrays (Y, X, 3) or (B, Y, X, 3), or tensors (3, Y, X) or
            (B, 3, Y, X), numbers in [0, 1].
        height: Resized to this height in pixels; None keeps the picture's own.
        width: Likewise.

    Raises:
        UserError: If it is none of these, or the pictures differ in size.
    """
    pixels = _read(_PIXELS, image, height, width, "image")
    if pixels.shape[1] != 3:
        raise UserError(f"image has {pixels.shape[1]} channels; a picture has 3: convert it to RGB")
    return pixels


def read_mask(mask: Pictures, height: int, width: int) -> Tensor:
    """A mask as (B, 1, Y, X) of zeros and ones: 1, white, is painted anew and 0, black, stays.

    Args:
        mask: One or several: PIL, arrays (Y, X) or (B, Y, X), or tensors likewise or with one
            channel, in [0, 1]; from 0.5 on it is white.
        height: Of the pictures; a mask of another size is resized.
        width: Likewise.

    Raises:
        UserError: If it is none of these.
    """
    pixels = _read(_MASKS, mask, height, width, "mask_image")
    if pixels.shape[1] != 1:
        raise UserError(
            f"mask_image has {pixels.shape[1]} channels; a mask has 1: convert it to grey ('L')"
        )
    return pixels


def mask_of_latents(mask: Tensor, factor: int) -> Tensor:
    """The mask on a grid `factor` times coarser: a cell is painted anew if any pixel of it is."""
    return F.max_pool2d(mask, factor) if factor > 1 else mask


def for_every_picture(rows: Tensor, count: int, repeats: int, what: str, of_what: str) -> Tensor:
    """One row for each of `count` pictures, `repeats` in a row of each.

    Raises:
        UserError: If there is neither one row nor one for each of count / repeats.
    """
    wanted = count // repeats
    if len(rows) not in (1, wanted):
        raise UserError(
            f"{len(rows)} of {what} for {wanted} of {of_what}: give one for all, or one for each"
        )
    return rows.expand(wanted, *rows.shape[1:]).repeat_interleave(repeats, dim=0)


def _read(
    processor: VaeImageProcessor, value: Pictures, height: int | None, width: int | None, name: str
) -> Tensor:
    values = list(value) if isinstance(value, list | tuple) else [value]
    kinds = (Image.Image, np.ndarray, Tensor)
    if not any(values and all(isinstance(v, kind) for v in values) for kind in kinds):
        kind = type(values[0]).__name__ if values else "empty list"
        raise UserError(
            f"{name} is {kind}: give a PIL image, an array, a tensor, or a list of one of them"
        )
    if isinstance(values[0], Image.Image) and (height is None or width is None):
        sizes = sorted({v.size for v in values})
        if len(sizes) > 1:
            raise UserError(
                f"{name} has pictures of several sizes, {sizes[0]} and {sizes[1]}: give height and "
                "width to resize them to"
            )
    if isinstance(values[0], Image.Image):
        return processor.preprocess(values, height=height, width=width)
    try:
        numbers = torch.cat([_four_dimensions(v, name == "mask_image") for v in values])
    except (TypeError, ValueError, RuntimeError) as error:
        shapes = ", ".join(str(tuple(np.shape(v))) for v in values)
        raise UserError(f"cannot read {name} of shape {shapes}: {error}") from error
    if not bool(((numbers >= 0) & (numbers <= 1)).all()):
        raise UserError(
            f"{name} holds numbers outside [0, 1]: divide bytes by 255, and map [-1, 1] to [0, 1]"
        )
    return processor.preprocess(numbers, height=height, width=width)


def _four_dimensions(value: np.ndarray | Tensor, is_mask: bool) -> Tensor:
    """(B, C, Y, X): channels come last in an array and before the sides in a tensor."""
    channels_last = isinstance(value, np.ndarray)
    numbers = torch.as_tensor(value).float()
    if is_mask and (numbers.ndim == 2 or (numbers.ndim == 3 and numbers.shape[-1] != 1)):
        return numbers[:, None] if numbers.ndim == 3 else numbers[None, None]
    if numbers.ndim == 3:
        numbers = numbers[None]
    if numbers.ndim != 4:
        raise ValueError(f"{numbers.ndim} dimensions")
    return numbers.permute(0, 3, 1, 2) if channels_last else numbers
