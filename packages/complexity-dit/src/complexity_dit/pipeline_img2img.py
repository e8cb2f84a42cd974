"""ComplexityDiTImg2ImgPipeline: a picture painted over, more or less of it."""

from collections.abc import Sequence

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from complexity_dit.denoising import Chunks, Guidance, StepCallback
from complexity_dit.pictures import Pictures, for_every_picture, read_pictures
from complexity_dit.pipeline_base import ComplexityDiTPipelineBase, Generators
from complexity_dit.pipeline_labels import LabelValue
from complexity_dit.schedulers import begin_at, network_times, set_steps
from complexity_dit.transformer import ComplexityDiTTransformer2DModel
from inl_core.run.errors import UserError


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
        chunks, device = Chunks(chunk_size, chunk_offset), self._execution_device

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
