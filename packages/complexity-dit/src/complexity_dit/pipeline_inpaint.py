"""ComplexityDiTInpaintPipeline: a part of a picture painted anew."""

from collections.abc import Sequence

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from complexity_dit.denoising import Chunks, Guidance, StepCallback
from complexity_dit.pictures import (
    Pictures,
    for_every_picture,
    mask_of_latents,
    read_mask,
    read_pictures,
)
from complexity_dit.pipeline_base import ComplexityDiTPipelineBase, Generators
from complexity_dit.pipeline_img2img import check_strength
from complexity_dit.pipeline_labels import LabelValue
from complexity_dit.schedulers import begin_at, network_times, noised, set_steps
from complexity_dit.transformer import ComplexityDiTTransformer2DModel


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
        chunks, device = Chunks(chunk_size, chunk_offset), self._execution_device

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
