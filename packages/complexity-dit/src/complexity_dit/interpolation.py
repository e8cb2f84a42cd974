"""Strips of pictures between two labels and between two seeds."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from complexity_dit.pipeline import ComplexityDiTPipeline
from complexity_dit.pipeline_labels import LabelValue
from inl_core.run.errors import UserError


def slerp(first: Tensor, last: Tensor, share: float) -> Tensor:
    """Spherical interpolation of two tensors as vectors (Shoemake 1985).

    Halfway between two draws of unit noise lies unit noise; their mean would be too quiet by the
    square root of two, and a network has never seen such an input.

    Args:
        first: Any shape.
        last: The same shape.
        share: 0 is `first` and 1 is `last`, both exactly.
    """
    a, b = first.double().flatten(), last.double().flatten()
    cosine = (a @ b / (a.norm() * b.norm())).clamp(-1, 1)
    angle = float(torch.arccos(cosine))
    if angle < 1e-6 or share in (0, 1):  # one direction: a straight line is the arc
        mixed = torch.lerp(a, b, share)
    else:
        mixed = (math.sin((1 - share) * angle) * a + math.sin(share * angle) * b) / math.sin(angle)
    return mixed.view_as(first).to(first.dtype)


def interpolate(
    pipe: ComplexityDiTPipeline,
    first: Mapping[str, LabelValue] | None = None,
    last: Mapping[str, LabelValue] | None = None,
    count: int = 8,
    seeds: tuple[int, int] = (0, 0),
    **settings: Any,
) -> Any:
    """Pictures on the way from one to another.

    The embeddings of the labels are blended linearly and the noise spherically, in equal steps; the
    first and the last picture are those of their labels and seeds alone.

    Args:
        pipe: A text-to-image pipeline.
        first: Labels of the first picture by field, e.g. `{"style": "Cubism"}`.
        last: Labels of the last one; None means those of the first.
        count: Pictures on the way, both ends counted; at least 2.
        seeds: Seed of the noise of the first and of the last picture.
        **settings: Further arguments of the pipeline: steps, guidance, size, `output_type`, ...

    Returns:
        `images` as the pipeline returns them: a list of `count` PIL images by default.

    Raises:
        UserError: For fewer than 2 pictures, unknown labels, or settings of the pipeline that are
            decided here (noise, labels, number of pictures).
    """
    if count < 2:
        raise UserError(f"count {count} must be at least 2: both ends of the strip")
    decided = {"generator", "latents", "class_labels", "label_embeds", "num_images_per_prompt"}
    if taken := sorted(decided & set(settings)):
        raise UserError(f"{taken[0]} is decided by first, last, count and seeds")
    if "return_dict" in settings:
        raise UserError("return_dict has no meaning here: the pictures themselves are returned")
    last = first if last is None else last
    ends = [pipe.get_label_embeds(**(labels or {})) for labels in (first, last)]
    height, width = (settings.get(side) or pipe.sample_size for side in ("height", "width"))
    factor, network = pipe.vae_scale_factor, pipe.transformer
    shape = (1, network.config.in_channels, height // factor, width // factor)
    noises = [
        randn_tensor(shape, generator=torch.Generator().manual_seed(seed), dtype=network.dtype)
        for seed in seeds
    ]
    shares = [i / (count - 1) for i in range(count)]
    return pipe(
        latents=torch.cat([slerp(*noises, share) for share in shares]),
        label_embeds=torch.cat([torch.lerp(*ends, share) for share in shares]),
        **settings,
    ).images
