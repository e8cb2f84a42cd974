"""ComplexityDiTPipeline: labels in, pictures out, as any diffusers pipeline.

Schedulers, VAEs, placement, offload and progress bars are diffusers' own; this file adds what they
cannot know: label fields by name, guidance towards the null rows, and folders that load through
`DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from complexity_dit.autoencoder import TinyAutoencoder
from complexity_dit.chunks import in_chunks
from complexity_dit.errors import UserError
from complexity_dit.labels import resolve_label
from complexity_dit.schedulers import is_guided, network_times, set_steps
from complexity_dit.transformer import ComplexityDiTTransformer2DModel
from complexity_dit.vae import Vae, scale_factor

LabelValue = str | int | None

_PIPELINE_SHIM = "pipeline_complexity_dit"
# Our classes among the components: diffusers does not know them, so a module of this name beside
# their weights imports them.
_SHIMS: dict[str, tuple[str, type]] = {
    "transformer": ("modeling_complexity_dit", ComplexityDiTTransformer2DModel),
    "vae": ("modeling_tiny_autoencoder", TinyAutoencoder),
}


class ComplexityDiTPipeline(DiffusionPipeline):
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
        config = transformer.config
        fields = dict(zip(config.label_fields, config.num_classes, strict=True))
        if id2label is None:
            id2label = {field: {i: str(i) for i in range(n)} for field, n in fields.items()}
        if {field: len(names) for field, names in id2label.items()} != fields:
            raise UserError(
                f"id2label names {', '.join(f'{len(v)} of {k}' for k, v in id2label.items())}; the "
                f"transformer was built for {fields}: pass the id2label it was trained with"
            )
        # JSON turned integer keys into strings and sorted the fields: undo both.
        self.id2label: dict[str, dict[int, str]] = {
            field: {int(i): name for i, name in id2label[field].items()} for field in fields
        }
        statistics = {len(values) for values in (latents_mean, latents_std) if values is not None}
        both = (latents_mean is None) == (latents_std is None)
        if not both or statistics - {config.in_channels} or (statistics and vae is None):
            raise UserError(
                "latents_mean and latents_std go together and with a VAE, one number for each of "
                f"the {config.in_channels} channels, not {latents_mean} and {latents_std}"
            )
        self.register_to_config(
            id2label=self.id2label, latents_mean=latents_mean, latents_std=latents_std
        )
        self.vae_scale_factor = scale_factor(vae) if vae is not None else 1
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def label_names(self) -> dict[str, list[str]]:
        """Label names per field, in id order."""
        return {f: [names[i] for i in range(len(names))] for f, names in self.id2label.items()}

    @property
    def sample_size(self) -> int:
        """Default side of a painting in pixels."""
        return self.transformer.config.sample_size * self.vae_scale_factor

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def num_evaluations(self) -> int:
        """How often a network ran for each picture of the last call, guidance counted."""
        return self._num_evaluations

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def get_label_ids(self, **labels: LabelValue | Sequence[LabelValue]) -> Tensor:
        """Turn labels by name or id into the transformer's `class_labels`.

        Args:
            **labels: One value or a list per field; None (or a field left out) means not given.
                Lists must be of one length, single values are repeated to it.

        Returns:
            Label ids, (B, F) int64, -1 where not given.

        Raises:
            UserError: For an unknown field or label (near names are listed) or unequal lists.
        """
        unknown = sorted(set(labels) - set(self.id2label))
        if unknown:
            raise UserError(
                f"unknown label field {unknown[0]!r}; this pipeline has "
                f"{', '.join(self.id2label) or 'no label fields'}"
            )
        lists = {f: v for f, v in labels.items() if isinstance(v, list | tuple)}
        lengths = {field: len(values) for field, values in lists.items()}
        if len(set(lengths.values())) > 1 or 0 in lengths.values():
            raise UserError(f"lists of labels must be of one length above 0, got {lengths}")
        batch = next(iter(lengths.values()), 1)
        columns = []
        for field, names in self.label_names.items():
            values = labels.get(field)
            row = list(values) if field in lists else [values] * batch
            columns.append([resolve_label(names, value, field) for value in row])
        return torch.tensor(columns, dtype=torch.long).reshape(len(columns), batch).T.contiguous()

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
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        class_labels: Tensor | None = None,
        chunk_size: int | None = None,
        chunk_offset: int = 0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict], dict] | None = None,
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
        self._check_inputs(
            height, width, num_inference_steps, guidance_interval, output_type,
            callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        if class_labels is None:
            class_labels = self.get_label_ids(**labels)
        elif labels:
            raise UserError(f"give class_labels or {', '.join(labels)}, not both")
        device, dtype = self._execution_device, self.transformer.dtype
        class_labels = class_labels.repeat_interleave(num_images_per_prompt, dim=0).to(device)
        batch = len(class_labels)
        if guide is not None:
            self._check_guide(guide)
        self._guidance_scale, self._interrupt, self._num_evaluations = guidance_scale, False, 0

        x = self._initial_latents(batch, height, width, generator, latents, device, dtype)
        timesteps = set_steps(self.scheduler, num_inference_steps, device)
        times = network_times(self.scheduler)
        self._num_timesteps = len(timesteps)

        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self._interrupt:
                    break
                model_input = x
                if hasattr(self.scheduler, "scale_model_input"):
                    model_input = self.scheduler.scale_model_input(x, t)
                guided = is_guided(times[i], guidance_scale, guidance_interval)
                prediction = self._predict(
                    model_input.to(dtype), times[i], class_labels, guided, guide,
                    chunk_size, chunk_offset,
                )  # fmt: skip
                self._num_evaluations += 1 + guided
                x = self.scheduler.step(prediction, t, x, return_dict=False)[0]
                if callback_on_step_end is not None:
                    offered = {"latents": x}
                    tensors = {name: offered[name] for name in callback_on_step_end_tensor_inputs}
                    x = callback_on_step_end(self, i, t, tensors).get("latents", x)
                progress_bar.update()

        if output_type == "latent":
            images = x
        else:
            pixels = self._decode(x, chunk_size, chunk_offset)
            images = self.image_processor.postprocess(pixels, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check_inputs(
        self,
        height: int,
        width: int,
        num_inference_steps: int,
        guidance_interval: tuple[float, float],
        output_type: str,
        callback_tensors: Sequence[str],
    ) -> None:
        multiple = self.transformer.config.patch_size * self.vae_scale_factor
        if height < 1 or width < 1 or height % multiple or width % multiple:
            raise UserError(
                f"height {height} and width {width} must be positive multiples of {multiple} "
                f"(patch {self.transformer.config.patch_size} x VAE {self.vae_scale_factor})"
            )
        if num_inference_steps < 1:
            raise UserError(f"num_inference_steps {num_inference_steps} must be at least 1")
        low, high = guidance_interval
        if not 0 <= low <= high <= 1:
            raise UserError(
                f"guidance_interval {guidance_interval} must satisfy 0 <= low <= high <= 1"
            )
        if output_type not in ("pil", "np", "pt", "latent"):
            raise UserError(f"output_type {output_type!r} must be pil, np, pt or latent")
        for name in callback_tensors:
            if name not in self._callback_tensor_inputs:
                raise UserError(
                    f"callback tensor {name!r} must be one of {self._callback_tensor_inputs}"
                )

    def _initial_latents(
        self,
        batch: int,
        height: int,
        width: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Tensor:
        channels, factor = self.transformer.config.in_channels, self.vae_scale_factor
        shape = (batch, channels, height // factor, width // factor)
        if isinstance(generator, list) and len(generator) != batch:
            raise UserError(f"{len(generator)} generators for {batch} images: give one for each")
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise UserError(f"latents of shape {tuple(latents.shape)} must be {shape}")
        # Flow-matching schedulers start from unit noise and have no init_noise_sigma.
        return latents.to(device, dtype) * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def _check_guide(self, guide: ComplexityDiTTransformer2DModel) -> None:
        """The guide must read the same input under the same labels."""
        for name in ("in_channels", "label_fields", "num_classes"):
            own, other = self.transformer.config[name], guide.config[name]
            if own != other:
                raise UserError(
                    f"the guide has {name} {other} and the transformer {own}: take a network that "
                    "was trained on the same data"
                )

    def _predict(
        self,
        latents: Tensor,
        t: Tensor,
        class_labels: Tensor,
        guided: bool,
        guide: ComplexityDiTTransformer2DModel | None,
        chunk_size: int | None,
        chunk_offset: int,
    ) -> Tensor:
        """The transformer's prediction, led away from a weaker one if `guided`."""

        def predict(x: Tensor, labels: Tensor) -> Tensor:
            if not guided:
                return self.transformer(x, t, labels, return_dict=False)[0]
            if guide is not None:
                strong = self.transformer(x, t, labels, return_dict=False)[0]
                weak = guide(x.to(guide.dtype), t, labels, return_dict=False)[0].to(strong)
            else:
                both = torch.cat([labels, torch.full_like(labels, -1)])
                strong, weak = self.transformer(
                    torch.cat([x, x]), t, both, return_dict=False
                )[0].chunk(2)  # fmt: skip
            return weak + self._guidance_scale * (strong - weak)

        return in_chunks(predict, chunk_size, chunk_offset, latents, class_labels)

    def _decode(self, latents: Tensor, chunk_size: int | None, chunk_offset: int) -> Tensor:
        """Latents to pixels in [-1, 1]; the identity without a VAE."""
        if self.vae is None:
            return latents
        config = self.vae.config
        if self.config.latents_mean is not None:
            mean, std = (
                torch.tensor(values, device=latents.device).view(-1, 1, 1)
                for values in (self.config.latents_mean, self.config.latents_std)
            )
            latents = latents * std + mean
        else:
            shift = getattr(config, "shift_factor", None) or 0.0
            latents = latents / config.scaling_factor + shift
        latents = latents.to(self.vae.dtype)
        return in_chunks(
            lambda z: self.vae.decode(z, return_dict=False)[0], chunk_size, chunk_offset, latents
        )

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Read `model_index.json`, pointing at the installed classes instead of the shims.

        Loading through this class needs no code from the folder, so none is run and no
        `trust_remote_code` is asked for.
        """
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if config.get("_class_name") == [_PIPELINE_SHIM, cls.__name__]:
            config["_class_name"] = cls.__name__
        for component, (shim, model) in _SHIMS.items():
            if config.get(component) == [shim, model.__name__]:
                config[component] = [model.__module__, model.__name__]
        return loaded

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save as a folder that `DiffusionPipeline.from_pretrained` can load.

        Besides what diffusers writes, the folder gets one-line modules that import the classes of
        this package (pipeline, transformer, and a `TinyAutoencoder`); `model_index.json` names
        them, because diffusers does not import a third-party package on its own.

        Args:
            save_directory: The folder.
            safe_serialization: Must be True; weights are safetensors only.
            push_to_hub: Also upload the folder (`repo_id`, `private`, `token`, `commit_message`).
            **kwargs: Further arguments of `DiffusionPipeline.save_pretrained`.
        """
        if not safe_serialization:
            raise UserError("safe_serialization=False would write a pickle; only safetensors here")
        hub = {k: kwargs.pop(k) for k in _HUB_ARGUMENTS if k in kwargs}
        super().save_pretrained(save_directory, **kwargs)
        folder = Path(save_directory)
        index_path = folder / self.config_name
        index = json.loads(index_path.read_text())
        index["_class_name"] = [_PIPELINE_SHIM, type(self).__name__]
        shims: list[tuple[Path, type]] = [(folder / f"{_PIPELINE_SHIM}.py", type(self))]
        for component, (shim, cls) in _SHIMS.items():
            if isinstance(getattr(self, component), cls):
                index[component] = [shim, cls.__name__]
                shims.append((folder / component / f"{shim}.py", cls))
        for path, cls in shims:
            path.write_text(f"from complexity_dit import {cls.__name__}  # noqa: F401\n")
        index_path.write_text(json.dumps(index, indent=2) + "\n")
        if push_to_hub:
            self._push_folder(folder, **hub)

    def _push_folder(
        self,
        folder: Path,
        repo_id: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> None:
        # After the shims are written: diffusers would upload before them.
        from huggingface_hub import create_repo, upload_folder

        repo_id = create_repo(
            repo_id or folder.name, exist_ok=True, private=private, token=token
        ).repo_id
        upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            token=token,
            commit_message=commit_message or f"Upload {type(self).__name__}",
            create_pr=create_pr,
        )


_HUB_ARGUMENTS = ("repo_id", "private", "token", "commit_message", "create_pr")
