"""ComplexityDiTPipeline: labels in, pictures out, as any diffusers pipeline."""

from collections.abc import Sequence

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from complexity_dit.denoising import Chunks, Guidance, StepCallback
from complexity_dit.pipeline_base import ComplexityDiTPipelineBase, Generators
from complexity_dit.pipeline_labels import LabelValue
from complexity_dit.schedulers import network_times, set_steps
from complexity_dit.transformer import ComplexityDiTTransformer2DModel


class ComplexityDiTPipeline(ComplexityDiTPipelineBase):
    """Pictures from labels; built as `ComplexityDiTPipelineBase` is."""

    @torch.no_grad()
    def __call__(
        self,
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
        """Paint.

        Args:
            num_images_per_prompt: Pictures for each label (combination).
            height: Height in pixels; None means the training size. Divisible by patch times VAE.
            width: Width in pixels, likewise.
            num_inference_steps: Denoising steps; each is one evaluation of the network, or two with
                a second-order scheduler such as Heun's (`num_evaluations` counts them).
            guidance_scale: Classifier-free guidance (Ho & Salimans, arXiv 2207.12598); 1 is off.
            guidance_interval: Noise levels in [0, 1] within which guidance acts (Kynkäänniemi et
                al., arXiv 2404.07724); outside it the conditional prediction is used alone.
            guide: A weaker network for the same labels and objective, e.g. an earlier checkpoint or
                a smaller model: guidance then leads away from its prediction for the same labels
                instead of away from the null rows (autoguidance; Karras et al., arXiv 2406.02507).
                On the pipeline's device.
            generator: One generator, or one for each image: then image i does not depend on the
                others. CPU generators give the same noise on every device.
            latents: Initial noise, (B, C, Y, X); drawn from `generator` when None.
            class_labels: Label ids, (B, F) with -1 for not given, instead of labels by name.
            label_embeds: Their embeddings, (B, D), instead: `get_label_embeds` gives them, and a
                blend of two is a picture between two labels.
            chunk_size: Run the networks on exactly this many images a call, the last call padded.
                Floating-point kernels may give other bits for another batch; at a fixed chunk the
                bits of an image do not depend on how many are painted beside it.
            chunk_offset: Position of the first image within its chunk.
            output_type: "pil", "np" (B, Y, X, C in [0, 1]), "pt" (B, C, Y, X) or "latent".
            return_dict: False returns a plain tuple.
            callback_on_step_end: Called as (pipeline, step, timestep, tensors) after each step; it
                may return replaced tensors, and may set `pipeline._interrupt`.
            callback_on_step_end_tensor_inputs: Which tensors the callback gets: "latents".
            **labels: One keyword for each label field: a name, an id, None, or a list of these.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple of them.

        Raises:
            UserError: For unknown labels, sizes that do not fit, or lists of unequal length.
        """
        height, width = height or self.sample_size, width or self.sample_size
        self._check_size(height, width)
        self._check_call(num_inference_steps, output_type, callback_on_step_end_tensor_inputs)
        condition = self._condition(class_labels, label_embeds, labels)
        guidance = Guidance(guidance_scale, guidance_interval, guide)
        guidance.check(self.transformer, condition)
        chunks, device = Chunks(chunk_size, chunk_offset), self._execution_device
        condition = condition.repeat_interleave(num_images_per_prompt, dim=0).to(device)

        noise = self._noise(len(condition), height, width, generator, latents)
        x = self._starting_from_noise(noise)
        timesteps = set_steps(self.scheduler, num_inference_steps, device)
        x = self._denoise(
            x, condition, timesteps, network_times(self.scheduler), guidance, chunks,
            callback_on_step_end, callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        return self._finish(x, output_type, return_dict, chunks)
