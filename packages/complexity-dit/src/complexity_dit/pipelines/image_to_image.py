"""ComplexityDiTImg2ImgPipeline: a picture painted over, more or less of it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel
from complexity_dit.pipelines.pipeline import (
    ComplexityDiTPipeline,
    ComplexityDiTPipelineBase,
    Generators,
    Guidance,
    LabelValue,
    NetworkBatches,
    StepCallback,
)
from complexity_dit.pipelines.schedulers import begin_at, network_times, noised, set_steps
from inl_core.run.errors import UserError

# Pictures and masks that a user hands to a pipeline, in any form that diffusers takes.

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


# Strips of pictures between two labels and between two seeds.


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


class ComplexityDiTImg2ImgPipeline(ComplexityDiTPipelineBase):
    """Pictures from pictures and labels; built as `ComplexityDiTPipelineBase` is.

    `ComplexityDiTImg2ImgPipeline.from_pipe(pipe)` shares the networks of a pipeline, and
    `from_pretrained` loads the same folders. SDEdit (Meng et al., arXiv 2108.01073).
    """

    @torch.no_grad()
    def __call__(  # noqa: D417 -- the rest is documented in ComplexityDiTPipeline
        self,
        image: Pictures,
        strength: float = 0.6,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 2.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guide: ComplexityDiTTransformer2DModel | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        class_labels: Tensor | None = None,
        label_embeds: Tensor | None = None,
        chunk_size: int | None = None,
        chunk_offset: int = 0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **labels: LabelValue | Sequence[LabelValue],
    ) -> ImagePipelineOutput | tuple:
        """Add noise to a picture and take it off again under other labels.

        Arguments that are not here are those of `ComplexityDiTPipeline`.

        Args:
            image: One picture for all labels, or one for each: PIL, arrays or tensors in [0, 1].
            strength: Share of the steps that is run, from the noise level where it begins. 0 gives
                the picture back (as the VAE sees it), 1 forgets it: then the result is that of
                `ComplexityDiTPipeline` for the same noise.
            num_images_per_prompt: Pictures for each label or picture.
            height: Height in pixels that `image` is resized to; None keeps its own.
            width: Width in pixels, likewise.
            num_inference_steps: Steps of a whole way from noise; see `strength`.
            generator: One generator, or one for each picture that is painted.
            latents: The noise that is added, (B, C, Y, X); drawn from `generator` when None.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple of them.

        Raises:
            UserError: For a strength outside [0, 1], pictures that cannot be read or whose size
                does not fit, or as `ComplexityDiTPipeline` does.
        """
        check_strength(strength)
        self._check_call(num_inference_steps, output_type, callback_on_step_end_tensor_inputs)
        pixels = read_pictures(image, height, width)
        self._check_size(*pixels.shape[-2:])
        condition = self._condition(class_labels, label_embeds, labels)
        guidance = Guidance(guidance_scale, guidance_interval, guide)
        guidance.check(self.transformer, condition)
        chunks, device = NetworkBatches(chunk_size, chunk_offset), self._execution_device

        count = max(len(condition), len(pixels)) * num_images_per_prompt
        condition = for_every_picture(
            condition, count, num_images_per_prompt, "labels", "images"
        ).to(device)
        pixels = for_every_picture(pixels, count, num_images_per_prompt, "images", "labels")
        noise = self._noise(count, *pixels.shape[-2:], generator, latents)
        clean = self._encode(pixels.to(device, noise.dtype), chunks).to(noise.dtype)
        timesteps = set_steps(self.scheduler, num_inference_steps, device)
        first = begin_at(self.scheduler, num_inference_steps, strength)
        x = self._starting_from_picture(clean, noise, first)
        x = self._denoise(
            x, condition, timesteps[first:], network_times(self.scheduler)[first:], guidance,
            chunks, callback_on_step_end, callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        return self._finish(x, output_type, return_dict, chunks)


def check_strength(strength: float) -> None:
    """Refuse a strength that is no share."""
    if not 0 <= strength <= 1:
        raise UserError(
            f"strength {strength} must be from 0 (the picture as it is) to 1 (a new one)"
        )


# ComplexityDiTInpaintPipeline: a part of a picture painted anew.


class ComplexityDiTInpaintPipeline(ComplexityDiTPipelineBase):
    """Parts of pictures from the rest of them and labels; built as `ComplexityDiTPipelineBase` is.

    No network of its own: after each step what is to stay is put back at the noise level of the
    step (Lugmayr et al., arXiv 2201.09865, without their resampling), and at the end as it was.
    """

    @torch.no_grad()
    def __call__(  # noqa: D417 -- the rest is documented in ComplexityDiTPipeline
        self,
        image: Pictures,
        mask_image: Pictures,
        strength: float = 1.0,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 2.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guide: ComplexityDiTTransformer2DModel | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        class_labels: Tensor | None = None,
        label_embeds: Tensor | None = None,
        chunk_size: int | None = None,
        chunk_offset: int = 0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **labels: LabelValue | Sequence[LabelValue],
    ) -> ImagePipelineOutput | tuple:
        """Paint where the mask is white.

        Arguments that are not here are those of `ComplexityDiTPipeline`.

        Args:
            image: One picture for all labels, or one for each: PIL, arrays or tensors in [0, 1].
            mask_image: One mask for all pictures, or one for each: white (from 0.5 on) is painted
                anew, black stays. Black pixels of the result are those of `image` (as the decoder
                is not perfect, they are taken from it). With a VAE, cells of latents that are white
                in part are painted whole; for output "latent" those that are black are `image`'s.
            strength: Below 1 the white part begins from `image` under that share of the steps'
                noise instead of from noise alone.
            num_images_per_prompt: Pictures for each label or picture.
            height: Height in pixels that `image` and mask are resized to; None keeps `image`'s.
            width: Width in pixels, likewise.
            num_inference_steps: Steps of a whole way from noise; see `strength`.
            generator: One generator, or one for each picture that is painted.
            latents: The noise, (B, C, Y, X); drawn from `generator` when None.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple of them.

        Raises:
            UserError: For a strength outside [0, 1], pictures or masks that cannot be read or whose
                size or number does not fit, or as `ComplexityDiTPipeline` does.
        """
        check_strength(strength)
        self._check_call(num_inference_steps, output_type, callback_on_step_end_tensor_inputs)
        pixels = read_pictures(image, height, width)
        size = pixels.shape[-2:]
        self._check_size(*size)
        mask = read_mask(mask_image, *size)
        condition = self._condition(class_labels, label_embeds, labels)
        guidance = Guidance(guidance_scale, guidance_interval, guide)
        guidance.check(self.transformer, condition)
        chunks, device = NetworkBatches(chunk_size, chunk_offset), self._execution_device

        count = max(len(condition), len(pixels)) * num_images_per_prompt
        condition = for_every_picture(
            condition, count, num_images_per_prompt, "labels", "images"
        ).to(device)
        pixels = for_every_picture(pixels, count, num_images_per_prompt, "images", "labels")
        mask = for_every_picture(mask, count, num_images_per_prompt, "masks", "images")
        noise = self._noise(count, *size, generator, latents)
        pixels, mask = pixels.to(noise), mask.to(noise)
        clean = self._encode(pixels, chunks).to(noise.dtype)
        anew = mask_of_latents(mask, self.vae_scale_factor)
        timesteps = set_steps(self.scheduler, num_inference_steps, device)
        first = begin_at(self.scheduler, num_inference_steps, strength)

        def put_back(step: int, x: Tensor) -> Tensor:
            # At the level that the step has led to: that of the next one, or none after the last.
            return torch.where(anew > 0, x, noised(self.scheduler, clean, noise, first + step + 1))

        x = self._starting_from_picture(clean, noise, first)
        x = self._denoise(
            x, condition, timesteps[first:], network_times(self.scheduler)[first:], guidance,
            chunks, callback_on_step_end, callback_on_step_end_tensor_inputs, put_back,
        )  # fmt: skip
        if output_type == "latent":
            return self._deliver(x, output_type, return_dict)
        painted = self._decode(x, chunks)
        painted = torch.where(mask > 0, painted, pixels.to(painted))
        return self._deliver(painted, output_type, return_dict)
