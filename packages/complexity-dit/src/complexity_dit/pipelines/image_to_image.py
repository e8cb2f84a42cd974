"""Pipelines that start from an image: image-to-image, inpainting, and strips of interpolations."""

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image
from torch import Tensor

from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel
from complexity_dit.pictures import upright_rgb
from complexity_dit.pipelines.pipeline import (
    ComplexityDiTPipeline,
    Generators,
    Labels,
    LabelValue,
    Prompts,
    StepCallback,
)
from inl_core.run.errors import UserError

Picture = Image.Image | np.ndarray | Tensor
Pictures = Picture | Sequence[Picture]

# vae_latent_channels=0: a tensor with as many channels as latents have would pass unprocessed.
_IMAGES = VaeImageProcessor(vae_scale_factor=1, do_convert_rgb=True, vae_latent_channels=0)
_MASKS = VaeImageProcessor(
    vae_scale_factor=1, do_normalize=False, do_binarize=True, do_convert_grayscale=True,
    vae_latent_channels=0,
)  # fmt: skip


def read_pictures(image: Pictures, height: int | None, width: int | None) -> Tensor:
    """Convert one image or several to (B, 3, Y, X) in [-1, 1], resized unless the size is None.

    Given are PIL images, arrays (Y, X, 3) or (B, Y, X, 3), or tensors (3, Y, X) or (B, 3, Y, X),
    with values in [0, 1]. PIL images are read as `complexity_dit.pictures.upright_rgb` reads them.
    """
    pixels = _read(_IMAGES, image, height, width, "image")
    if pixels.shape[1] != 3:
        raise UserError(f"image has {pixels.shape[1]} channels, expected 3: convert it to RGB")
    return pixels


def read_mask(mask: Pictures, height: int, width: int) -> Tensor:
    """Convert one mask or several to (B, 1, Y, X) of ones (replace) and zeros (keep).

    Given are PIL images, arrays (Y, X) or (B, Y, X), or tensors likewise or with one channel, with
    values in [0, 1]; 0.5 and above is 1. Height and width are those of the image. PIL images are
    read as those of `read_pictures`: what is transparent in a mask is replaced.
    """
    pixels = _read(_MASKS, mask, height, width, "mask_image")
    if pixels.shape[1] != 1:
        raise UserError(
            f"mask_image has {pixels.shape[1]} channels, expected 1: convert it to grey ('L')"
        )
    return pixels


def _read(
    processor: VaeImageProcessor, value: Pictures, height: int | None, width: int | None, name: str
) -> Tensor:
    values = list(value) if isinstance(value, list | tuple) else [value]
    types = (Image.Image, np.ndarray, Tensor)
    if not any(values and all(isinstance(v, one) for v in values) for one in types):
        actual = type(values[0]).__name__ if values else "empty list"
        raise UserError(
            f"{name} is {actual}: pass a PIL image, an array, a tensor, or a list of one of them"
        )
    if isinstance(values[0], Image.Image):
        try:
            values = [upright_rgb(v) for v in values]
        except UserError as error:
            raise UserError(f"{name} {error}") from error
        sizes = sorted({v.size for v in values})
        if len(sizes) > 1 and (height is None or width is None):
            raise UserError(
                f"{name} has images of several sizes, {sizes[0]} and {sizes[1]}: pass height and "
                "width to resize them to"
            )
        return processor.preprocess(values, height=height, width=width)
    try:
        numbers = torch.cat([_four_dimensions(v, name == "mask_image") for v in values])
    except (TypeError, ValueError, RuntimeError) as error:
        shapes = ", ".join(str(tuple(np.shape(v))) for v in values)
        raise UserError(f"cannot read {name} of shape {shapes}: {error}") from error
    if not bool(((numbers >= 0) & (numbers <= 1)).all()):
        raise UserError(
            f"{name} has values outside [0, 1]: divide bytes by 255, and map [-1, 1] to [0, 1]"
        )
    return processor.preprocess(numbers, height=height, width=width)


def _four_dimensions(value: np.ndarray | Tensor, is_mask: bool) -> Tensor:
    """(B, C, Y, X) from an array with channels last or a tensor with channels first."""
    channels_last = isinstance(value, np.ndarray)
    numbers = torch.as_tensor(value).float()
    if is_mask and (numbers.ndim == 2 or (numbers.ndim == 3 and numbers.shape[-1] != 1)):
        return numbers[:, None] if numbers.ndim == 3 else numbers[None, None]
    if numbers.ndim == 3:
        numbers = numbers[None]
    if numbers.ndim != 4:
        raise ValueError(f"{numbers.ndim} dimensions")
    return numbers.permute(0, 3, 1, 2) if channels_last else numbers


class ComplexityDiTImg2ImgPipeline(ComplexityDiTPipeline):
    """Images from images, prompts and labels: SDEdit (Meng et al., arXiv 2108.01073).

    Built as `ComplexityDiTPipeline` is. `from_pipe(pipe)` shares the networks of another pipeline,
    and `from_pretrained` loads the same folders.
    """

    @torch.no_grad()
    def __call__(  # noqa: D417  # pyright: ignore -- the rest is documented in the parent
        self,
        /,
        image: Pictures,
        strength: float = 0.6,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guide: ComplexityDiTTransformer2DModel | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        class_labels: Any = None,
        label_embeds: Tensor | None = None,
        chunk_size: int | None = None,
        chunk_offset: int = 0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        labels: Labels | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        internal_guidance_scale: float | None = None,
        num_loops: int | None = None,
        prompt: Prompts = None,
        negative_prompt: Prompts = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        **named: Any,
    ) -> ImagePipelineOutput | tuple:
        """Add noise to an image and denoise it under another prompt or other labels.

        Arguments not listed here are those of `ComplexityDiTPipeline`.

        Args:
            image: One image for all prompts and labels, or one each: PIL, arrays or tensors in
                [0, 1]; or
                latents (B, C, Y, X) as `output_type="latent"` returns them, if C is not 3.
            strength: Share of the steps to run. 0 returns the image (as the VAE decodes it); 1
                keeps nothing of it and gives the result of `ComplexityDiTPipeline` for that noise.
            num_images_per_prompt: Images per prompt, label or input image.
            height: Height in pixels to resize `image` to; None keeps its own.
            width: Width in pixels, likewise.
            num_inference_steps: Steps from pure noise, of which `strength` selects a share.
            latents: The noise to add, (B, C, Y, X); drawn from `generator` when None.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple of them.

        Raises:
            UserError: For a strength outside [0, 1], images that cannot be read or whose size or
                number does not fit, or as `ComplexityDiTPipeline` does.
        """
        channels = self.transformer.config.in_channels
        if isinstance(image, Tensor) and image.ndim == 4 and image.shape[1] == channels != 3:
            if height is not None or width is not None:
                raise UserError("latents as image have a size: leave height and width out")
            pixels = image
        else:
            pixels = read_pictures(image, height, width)
        return self._sample(SimpleNamespace(**locals()), pixels, strength=strength)


class ComplexityDiTInpaintPipeline(ComplexityDiTPipeline):
    """Regions of images regenerated from the rest, prompts and labels.

    Built as `ComplexityDiTPipeline` is.

    The network is an ordinary one: after each step the region to keep is replaced by the image at
    the noise level of that step (Lugmayr et al., arXiv 2201.09865, without their resampling), and
    at the end by the image itself.
    """

    @torch.no_grad()
    def __call__(  # noqa: D417  # pyright: ignore -- the rest is documented in the parent
        self,
        /,
        image: Pictures,
        mask_image: Pictures,
        strength: float = 1.0,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guide: ComplexityDiTTransformer2DModel | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        class_labels: Any = None,
        label_embeds: Tensor | None = None,
        chunk_size: int | None = None,
        chunk_offset: int = 0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        labels: Labels | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        internal_guidance_scale: float | None = None,
        num_loops: int | None = None,
        prompt: Prompts = None,
        negative_prompt: Prompts = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        **named: Any,
    ) -> ImagePipelineOutput | tuple:
        """Regenerate the white part of a mask.

        Arguments not listed here are those of `ComplexityDiTImg2ImgPipeline`.

        Args:
            image: One image for all prompts and labels, or one each: PIL, arrays or tensors in
                [0, 1].
            mask_image: One mask for all images, or one each: white (0.5 and above) is regenerated,
                black is kept. Black pixels are copied from `image`, because a VAE does not
                reproduce them exactly. With a VAE, a latent that is white in part is regenerated;
                for output "latent" the black latents are those of `image`.
            strength: Below 1 the white part starts from `image` under noise, with that share of
                the steps, instead of from noise alone.
            height: Height in pixels to resize `image` and mask to; None keeps that of `image`.
            width: Width in pixels, likewise.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple of them.

        Raises:
            UserError: For a strength outside [0, 1], images or masks that cannot be read or whose
                size or number does not fit, or as `ComplexityDiTPipeline` does.
        """
        pixels = read_pictures(image, height, width)
        mask = read_mask(mask_image, *pixels.shape[-2:])
        return self._sample(SimpleNamespace(**locals()), pixels, mask, strength)


def slerp(first: Tensor, last: Tensor, share: float) -> Tensor:
    """Spherical interpolation of two tensors as vectors (Shoemake 1985).

    Halfway between two draws of unit noise it gives unit noise; their mean would have a standard
    deviation smaller by the square root of two, which a network has never seen.

    Args:
        first: Any shape.
        last: The same shape.
        share: 0 is `first` and 1 is `last`, both exactly.
    """
    a, b = first.double().flatten(), last.double().flatten()
    cosine = (a @ b / (a.norm() * b.norm())).clamp(-1, 1)
    angle = float(torch.arccos(cosine))
    if angle < 1e-6 or share in (0, 1):  # for parallel vectors the arc is a straight line
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
    """Generate a strip of images between two labels and two seeds.

    Label embeddings are interpolated linearly and noise spherically, in equal steps; the first and
    the last image are those of their labels and seeds alone.

    Args:
        pipe: A pipeline that starts from noise.
        first: Labels of the first image by field, e.g. `{"style": "Cubism"}`.
        last: Labels of the last one; None means those of the first.
        count: Images in the strip, both ends included; at least 2.
        seeds: Seed of the noise of the first and of the last image.
        **settings: Further arguments of the pipeline: steps, guidance, size, `output_type`, ...

    Returns:
        `images` as the pipeline returns them: a list of `count` PIL images by default.

    Raises:
        UserError: For fewer than 2 images, unknown labels, or settings of the pipeline that are
            determined by the other arguments (noise, labels, number of images).
    """
    if count < 2:
        raise UserError(f"count {count} must be at least 2: both ends of the strip")
    reserved = {"generator", "latents", "class_labels", "label_embeds", "num_images_per_prompt"}
    if taken := sorted(reserved & set(settings)):
        raise UserError(f"{taken[0]} is determined by first, last, count and seeds")
    if "return_dict" in settings:
        raise UserError("return_dict has no meaning here: the images themselves are returned")
    last = first if last is None else last
    size = [settings.get(side) or pipe.sample_size for side in ("height", "width")]
    noises = [
        pipe._noise(1, *size, torch.Generator().manual_seed(seed), latents=None) for seed in seeds
    ]
    ends = [
        pipe._filled_by_noise(pipe.get_label_ids(labels), noise)
        for labels, noise in zip((first, last), noises, strict=True)
    ]
    shares = [i / (count - 1) for i in range(count)]
    return pipe(**between(pipe, ends, noises, shares), **settings).images


@torch.no_grad()
def between(
    pipe: ComplexityDiTPipeline, ends: Sequence[Tensor], noises: Sequence[Tensor],
    shares: Sequence[float],
) -> dict[str, Tensor]:  # fmt: skip
    """Arguments of a pipeline for images between two.

    Args:
        pipe: The pipeline.
        ends: Label ids of both, (1, F) each.
        noises: Noise of both, (1, C, Y, X) each.
        shares: Where the images lie: 0 is the first and 1 the last.
    """
    embeds = [pipe.transformer.embed_labels(ids.to(pipe._execution_device)) for ids in ends]
    return {
        "latents": torch.cat([slerp(*noises, share) for share in shares]),
        "label_embeds": torch.cat([torch.lerp(*embeds, share) for share in shares]),
    }
