"""What the pipelines of this package have in common: components, sizes, noise, and the VAE.

Schedulers, VAEs, placement, offload and progress bars are diffusers' own; the mixins add what they
cannot know: label fields by name, guidance towards the null rows, and folders that load by
themselves.
"""

from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from complexity_dit.denoising import Chunks, DenoisingMixin
from complexity_dit.offloading import OffloadingMixin
from complexity_dit.pipeline_files import FilesMixin
from complexity_dit.pipeline_labels import LabelsMixin, read_id2label
from complexity_dit.pipeline_lora import LoraMixin
from complexity_dit.schedulers import noised
from complexity_dit.transformer import ComplexityDiTTransformer2DModel
from complexity_dit.vae import Vae, posterior, scale_factor
from inl_core.run.errors import UserError

Generators = torch.Generator | list[torch.Generator] | None


class ComplexityDiTPipelineBase(
    LabelsMixin, DenoisingMixin, FilesMixin, LoraMixin, OffloadingMixin, DiffusionPipeline
):
    """Label-conditional image generation with a ComplexityDiT.

    Args:
        transformer: The denoiser.
        scheduler: Any stock diffusers scheduler that fits the training objective.
        vae: `AutoencoderKL`, `AutoencoderTiny` or `TinyAutoencoder` for latents; None paints pixels
            directly.
        id2label: Names of the labels, `{field: {id: name}}`, in the transformer's field order.
        latents_mean: Mean of each latent channel in training: the VAE gets x * std + mean. None
            means that the VAE's own scaling and shift factors stand between them.
        latents_std: Standard deviation of each latent channel, given together with the mean.

    Raises:
        UserError: If `id2label` does not match the transformer's label fields, or the statistics
            do not match its channels.
    """

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]
    _optional_components: ClassVar[list[str]] = ["vae"]

    def __init__(
        self,
        transformer: ComplexityDiTTransformer2DModel,
        scheduler: SchedulerMixin,
        vae: Vae | None = None,
        id2label: dict | None = None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        own_labels = read_id2label(id2label, transformer)
        channels = transformer.config.in_channels
        statistics = {len(values) for values in (latents_mean, latents_std) if values is not None}
        both = (latents_mean is None) == (latents_std is None)
        if not both or statistics - {channels} or (statistics and vae is None):
            raise UserError(
                "latents_mean and latents_std go together and with a VAE, one number for each of "
                f"the {channels} channels, not {latents_mean} and {latents_std}"
            )
        self.register_to_config(
            id2label=own_labels, latents_mean=latents_mean, latents_std=latents_std
        )
        self.vae_scale_factor = scale_factor(vae) if vae is not None else 1
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def sample_size(self) -> int:
        """Default side of a painting in pixels."""
        return self.transformer.config.sample_size * self.vae_scale_factor

    def _check_size(self, height: int, width: int) -> None:
        multiple = self.transformer.config.patch_size * self.vae_scale_factor
        if height < 1 or width < 1 or height % multiple or width % multiple:
            raise UserError(
                f"height {height} and width {width} must be positive multiples of {multiple} "
                f"(patch {self.transformer.config.patch_size} x VAE {self.vae_scale_factor})"
            )

    def _noise(
        self, batch: int, height: int, width: int, generator: Generators, latents: Tensor | None
    ) -> Tensor:
        """Unit noise for pictures of a size in pixels: drawn, or `latents` if they fit."""
        device, dtype = self._execution_device, self.transformer.dtype
        channels, factor = self.transformer.config.in_channels, self.vae_scale_factor
        shape = (batch, channels, height // factor, width // factor)
        if isinstance(generator, list) and len(generator) != batch:
            raise UserError(f"{len(generator)} generators for {batch} images: give one for each")
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        if tuple(latents.shape) != shape:
            raise UserError(f"latents of shape {tuple(latents.shape)} must be {shape}")
        return latents.to(device, dtype)

    def _starting_from_noise(self, noise: Tensor) -> Tensor:
        # Flow-matching schedulers start from unit noise and have no init_noise_sigma.
        return noise * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def _starting_from_picture(self, clean: Tensor, noise: Tensor, first: int) -> Tensor:
        """What step `first` begins with; before the first step nothing of the picture is left."""
        if first == 0:
            return self._starting_from_noise(noise)
        return noised(self.scheduler, clean, noise, first)

    def _encode(self, pixels: Tensor, chunks: Chunks) -> Tensor:
        """Pixels in [-1, 1] to what the transformer works on; the identity without a VAE.

        The mean of the VAE's posterior: no noise but the one that is asked for.
        """
        if self.vae is None:
            return pixels
        vae = self.vae
        latents = chunks.run(lambda x: posterior(vae, x)[0], pixels.to(vae.dtype))
        mean, std = self._latent_scale(latents)
        return (latents - mean) / std

    def _decode(self, latents: Tensor, chunks: Chunks) -> Tensor:
        """Latents to pixels in [-1, 1]; the identity without a VAE."""
        if self.vae is None:
            return latents
        vae = self.vae
        if self.config.latents_mean is not None:
            mean, std = self._latent_scale(latents)
            latents = latents * std + mean
        else:
            shift = getattr(vae.config, "shift_factor", None) or 0.0
            latents = latents / vae.config.scaling_factor + shift
        return chunks.run(lambda z: vae.decode(z, return_dict=False)[0], latents.to(vae.dtype))

    def _latent_scale(self, like: Tensor) -> tuple[Any, Any]:
        """Mean and standard deviation of the VAE's latents, as training saw them."""
        if self.config.latents_mean is not None:
            mean, std = (
                torch.tensor(values, device=like.device).view(-1, 1, 1)
                for values in (self.config.latents_mean, self.config.latents_std)
            )
            return mean, std
        config = self.vae.config
        return getattr(config, "shift_factor", None) or 0.0, 1 / config.scaling_factor

    def _finish(
        self, x: Tensor, output_type: str, return_dict: bool, chunks: Chunks
    ) -> ImagePipelineOutput | tuple:
        """Decode into what the user asked for, and let offloaded models go."""
        pixels = x if output_type == "latent" else self._decode(x, chunks)
        return self._deliver(pixels, output_type, return_dict)

    def _deliver(
        self, pixels: Tensor, output_type: str, return_dict: bool
    ) -> ImagePipelineOutput | tuple:
        images: Any = pixels
        if output_type != "latent":
            images = self.image_processor.postprocess(pixels, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
