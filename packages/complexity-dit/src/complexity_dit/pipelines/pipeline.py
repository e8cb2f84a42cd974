"""ComplexityDiTPipeline: labels in, pictures out, as any diffusers pipeline."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from complexity_dit.labels import resolve_label
from complexity_dit.models.adapters import OFFLOAD_REASON, label_rows, read_adapter
from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel
from complexity_dit.models.vae import Vae, posterior, scale_factor
from complexity_dit.pipelines.saving import FilesMixin
from complexity_dit.pipelines.schedulers import is_guided, network_times, noised, set_steps
from inl_core.run.errors import UserError

# Labels of a pipeline: their names, ids by name, and the condition that the network is given.
#
# A mixin, because every pipeline of this package is asked for pictures in the same words.

LabelValue = str | int | None


def read_id2label(
    id2label: Mapping | None, transformer: ComplexityDiTTransformer2DModel
) -> dict[str, dict[int, str]]:
    """Names of the labels, in the transformer's field order, with whole numbers as ids.

    Raises:
        UserError: If they are not those that the transformer was built for.
    """
    config = transformer.config
    fields = dict(zip(config.label_fields, config.num_classes, strict=True))
    if id2label is None:
        id2label = {field: {i: str(i) for i in range(n)} for field, n in fields.items()}
    if not isinstance(id2label, Mapping) or not all(
        isinstance(names, Mapping) and all(isinstance(name, str) for name in names.values())
        for names in id2label.values()
    ):
        raise UserError("id2label is no table of names: it is {field: {id: name}}, names are text")
    if {field: len(names) for field, names in id2label.items()} != fields:
        raise UserError(
            f"id2label names {', '.join(f'{len(v)} of {k}' for k, v in id2label.items())}; the "
            f"transformer was built for {fields}: pass the id2label it was trained with"
        )
    # JSON turned integer keys into strings and sorted the fields: undo both.
    table = {field: {str(i): name for i, name in id2label[field].items()} for field in fields}
    for field, names in table.items():
        if set(names) != {str(i) for i in range(len(names))}:
            raise UserError(
                f"the ids of {field} in id2label are {', '.join(map(repr, list(names)[:5]))}, …; "
                f"expected 0 to {len(names) - 1}"
            )
    return {field: {int(i): name for i, name in names.items()} for field, names in table.items()}


class LabelsMixin:
    """What a pipeline knows about its labels. Needs `transformer` and `config.id2label`."""

    transformer: ComplexityDiTTransformer2DModel
    config: Any

    @property
    def id2label(self) -> dict[str, dict[int, str]]:
        """Names by field and id: those of the network, then those that adapters brought."""
        # Another denoiser behind the same arguments (see `train`) takes no adapters.
        added = getattr(self.transformer, "added_labels", {})
        return {
            field: names | dict(enumerate(added.get(field, ()), len(names)))
            for field, names in self.config.id2label.items()
        }

    @property
    def label_names(self) -> dict[str, list[str]]:
        """Label names per field, in id order."""
        return {f: [names[i] for i in range(len(names))] for f, names in self.id2label.items()}

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
    def get_label_embeds(self, **labels: LabelValue | Sequence[LabelValue]) -> Tensor:
        """What labels mean to the network, (B, D), to blend and to pass as `label_embeds`.

        Args:
            **labels: As for `get_label_ids`.
        """
        device = self.transformer.device
        return self.transformer.embed_labels(self.get_label_ids(**labels).to(device))

    def _condition(
        self,
        class_labels: Tensor | None,
        label_embeds: Tensor | None,
        labels: Mapping[str, LabelValue | Sequence[LabelValue]],
    ) -> Tensor:
        """Label ids (B, F), or embeddings (B, D): what was given, in one of three ways."""
        given = {"class_labels": class_labels is not None, "label_embeds": label_embeds is not None}
        names = [name for name, is_given in given.items() if is_given] + list(labels)
        if (class_labels is not None or label_embeds is not None) and len(names) > 1:
            raise UserError(f"give {names[0]} or {', '.join(names[1:])}, not both")
        if label_embeds is not None:
            width = self.transformer.config.hidden_size
            if label_embeds.ndim != 2 or label_embeds.shape[1] != width:
                raise UserError(
                    f"label_embeds of shape {tuple(label_embeds.shape)} must be (B, {width}), as "
                    "get_label_embeds makes them"
                )
            return label_embeds
        return self.get_label_ids(**labels) if class_labels is None else class_labels


# Adapters at the level of the pipeline: loaded, merged and unloaded as in diffusers.
#
# The new labels of an adapter are asked for by name as soon as it is loaded; see `adapters`.


class LoraMixin(LoraBaseMixin):
    """`load_lora_weights` and what goes with it. Needs `transformer` and `label_names`."""

    _lora_loadable_modules: ClassVar[list[str]] = ["transformer"]
    transformer_name = "transformer"
    transformer: ComplexityDiTTransformer2DModel
    label_names: dict[str, list[str]]

    @classmethod
    def lora_state_dict(cls, source: Any, **kwargs: Any) -> Any:  # pyright: ignore
        """An adapter's tensors by name; with `return_lora_metadata`, PEFT's settings too."""
        both = kwargs.pop("return_lora_metadata", False)
        tensors, metadata = read_adapter(source, None, **kwargs)
        return (tensors, metadata) if both else tensors

    def load_lora_weights(  # pyright: ignore
        self, source: Any, adapter_name: str | None = None, **kwargs: Any
    ) -> None:
        """Load an adapter; its new labels can then be asked for by name.

        Args:
            source: A folder, a safetensors file, a Hub id, or tensors by name.
            adapter_name: What to call it, for `set_adapters`, `fuse_lora` and `delete_adapters`.
            **kwargs: As for `load_lora_adapter` of the transformer.

        Raises:
            UserError: If there is no such adapter, it is one of another network, or it brings a
                label that the pipeline has.
        """
        fetching = {k: v for k, v in kwargs.items() if k in ("weight_name", "subfolder", "revision",
                    "token", "cache_dir", "local_files_only", "force_download", "proxies",
                    "use_safetensors")}  # fmt: skip
        tensors, metadata = read_adapter(source, None, **fetching)
        prefix = self.transformer_name
        for field, rows in label_rows(read_adapter(tensors, prefix)[0]).items():
            for name in rows:
                if name in self.label_names.get(field, ()):
                    raise UserError(
                        f"the adapter brings {field} {name!r}, which this pipeline has: load it "
                        "into the pipeline it was trained on"
                    )
        if metadata is not None:
            head = f"{prefix}."
            metadata = {k.removeprefix(head): v for k, v in metadata.items() if k.startswith(head)}
        rest = {k: v for k, v in kwargs.items() if k not in fetching}
        self.transformer.load_lora_adapter(
            tensors, prefix=prefix, adapter_name=adapter_name, metadata=metadata, _pipeline=self,
            **rest,
        )  # fmt: skip

    @classmethod
    def save_lora_weights(  # pyright: ignore
        cls,
        save_directory: Any,
        transformer_lora_layers: dict,
        transformer_lora_adapter_metadata: dict | None = None,
        weight_name: str | None = None,
        is_main_process: bool = True,
        save_function: Any = None,
        safe_serialization: bool = True,
    ) -> None:
        """Write an adapter folder: `transformer.adapter_state_dict()` are the layers."""
        if not safe_serialization:
            raise UserError("safe_serialization=False would write a pickle; only safetensors here")
        cls._save_lora_weights(
            save_directory, {cls.transformer_name: transformer_lora_layers},
            {cls.transformer_name: transformer_lora_adapter_metadata}, is_main_process,
            weight_name, save_function,  # pyright: ignore
        )  # fmt: skip

    def fuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Merge adapters into the weights (`lora_scale`, `safe_fusing`, `adapter_names`)."""
        super().fuse_lora(components or self._lora_loadable_modules, **kwargs)

    def unfuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Undo `fuse_lora`, while the adapters are loaded."""
        super().unfuse_lora(components or self._lora_loadable_modules, **kwargs)


# Networks run on a fixed number of rows, so that bits do not depend on the batch.


def run_in_fixed_batches(
    network: Callable[..., Tensor], chunk_size: int | None, offset: int, *rows: Tensor
) -> Tensor:
    """Run a network over rows, `chunk_size` at a time, padded so that every call has that many.

    Row i sits at position (offset + i) mod chunk_size of its call, whatever rows are beside it.
    """
    if chunk_size is None:
        return network(*rows)
    count, offset = len(rows[0]), offset % chunk_size
    padding = -(offset + count) % chunk_size
    padded = [
        torch.cat([x[:1].expand(offset, *x.shape[1:]), x, x[-1:].expand(padding, *x.shape[1:])])
        for x in rows
    ]
    outputs = [
        network(*chunk) for chunk in zip(*(x.split(chunk_size) for x in padded), strict=True)
    ]
    return torch.cat(outputs)[offset : offset + count]


# The denoising loop that every pipeline shares: predictions, guidance, scheduler steps, callbacks.
#
# Which noise level it starts from, and what is done between steps, is the pipeline's.

StepCallback = Callable[[Any, int, Tensor, dict], dict]


@dataclass(frozen=True)
class Guidance:
    """How far, where, and from what a prediction is led away.

    Attributes:
        scale: 1 is off.
        interval: Noise levels in [0, 1] within which it acts, closed.
        guide: A weaker network; None stands for the null rows of the network itself.
    """

    scale: float
    interval: tuple[float, float]
    guide: ComplexityDiTTransformer2DModel | None

    def check(self, transformer: ComplexityDiTTransformer2DModel, condition: Tensor) -> None:
        """Refuse a guide that cannot read the same input under the same labels."""
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise UserError(f"guidance_interval {self.interval} must satisfy 0 <= low <= high <= 1")
        if self.guide is None:
            return
        if condition.is_floating_point():
            raise UserError(
                "label_embeds are one network's own and mean nothing to a guide: give class_labels"
            )
        for name in ("in_channels", "label_fields", "num_classes"):
            own, other = transformer.config[name], self.guide.config[name]
            if own != other:
                raise UserError(
                    f"the guide has {name} {other} and the transformer {own}: take a network that "
                    "was trained on the same data"
                )


@dataclass(frozen=True)
class NetworkBatches:
    """Rows of one network call, and the place of the first picture among them."""

    size: int | None
    offset: int

    def run(self, network: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        return run_in_fixed_batches(network, self.size, self.offset, *rows)


class DenoisingMixin:
    """The loop. Needs `transformer`, `scheduler` and what `DiffusionPipeline` has."""

    transformer: ComplexityDiTTransformer2DModel
    scheduler: SchedulerMixin
    progress_bar: Callable[..., Any]
    _callback_tensor_inputs: ClassVar[list[str]]

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

    def _denoise(
        self,
        x: Tensor,
        condition: Tensor,
        timesteps: Tensor,
        times: Tensor,
        guidance: Guidance,
        chunks: NetworkBatches,
        callback: StepCallback | None,
        callback_tensors: Sequence[str],
        after_step: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """From the noise level of `timesteps[0]` to the picture.

        Args:
            x: Noisy pictures or latents, (B, C, Y, X).
            condition: Label ids (B, F) or embeddings (B, D).
            timesteps: What the scheduler is stepped with; no steps leave `x` as it is.
            times: What the network is told, in [0, 1000], one for each.
            guidance: What predictions are led away from.
            chunks: How many pictures a network call has.
            callback: As in the call of the pipeline.
            callback_tensors: Likewise.
            after_step: Takes the number of a step and what it made, before the callback sees it.
        """
        self._guidance_scale, self._interrupt, self._num_evaluations = guidance.scale, False, 0
        self._num_timesteps = len(timesteps)
        dtype = self.transformer.dtype
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self._interrupt:
                    break
                model_input = x
                if hasattr(self.scheduler, "scale_model_input"):
                    model_input = self.scheduler.scale_model_input(x, t)
                guided = is_guided(times[i], guidance.scale, guidance.interval)
                prediction = self._predict(
                    model_input.to(dtype), times[i], condition, guidance if guided else None, chunks
                )
                self._num_evaluations += 1 + guided
                x = self.scheduler.step(prediction, t, x, return_dict=False)[0]
                if after_step is not None:
                    x = after_step(i, x)
                if callback is not None:
                    offered = {"latents": x}
                    tensors = {name: offered[name] for name in callback_tensors}
                    x = callback(self, i, t, tensors).get("latents", x)
                progress_bar.update()
        return x

    def _predict(
        self,
        x: Tensor,
        t: Tensor,
        condition: Tensor,
        guidance: Guidance | None,
        chunks: NetworkBatches,
    ) -> Tensor:
        """The transformer's prediction, led away from a weaker one if there is guidance."""

        def predict(x: Tensor, condition: Tensor) -> Tensor:
            if guidance is None:
                return _run(self.transformer, x, t, condition)
            if (guide := guidance.guide) is not None:
                strong = _run(self.transformer, x, t, condition)
                weak = _run(guide, x.to(guide.dtype), t, condition).to(strong)
            else:
                both = torch.cat([condition, self._null(condition)])
                strong, weak = _run(self.transformer, torch.cat([x, x]), t, both).chunk(2)
            return weak + guidance.scale * (strong - weak)

        return chunks.run(predict, x, condition)

    def _null(self, condition: Tensor) -> Tensor:
        """The condition of the same form that stands for "nothing given"."""
        if not condition.is_floating_point():
            return torch.full_like(condition, -1)
        fields = len(self.transformer.config.label_fields)
        # Where the transformer is: offloaded, it comes to the condition with its first forward.
        missing = torch.full((len(condition), fields), -1, device=self.transformer.device)
        return self.transformer.embed_labels(missing).to(condition)

    def _check_call(
        self, num_inference_steps: int, output_type: str, callback_tensors: Sequence[str]
    ) -> None:
        if num_inference_steps < 1:
            raise UserError(f"num_inference_steps {num_inference_steps} must be at least 1")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise UserError(f"output_type {output_type!r} must be pil, np, pt or latent")
        for name in callback_tensors:
            if name not in self._callback_tensor_inputs:
                raise UserError(
                    f"callback tensor {name!r} must be one of {self._callback_tensor_inputs}"
                )


def _run(
    network: ComplexityDiTTransformer2DModel, x: Tensor, t: Tensor, condition: Tensor
) -> Tensor:
    if condition.is_floating_point():
        return network(x, t, label_embeds=condition, return_dict=False)[0]
    return network(x, t, condition, return_dict=False)[0]


class OffloadingMixin:
    """For a pipeline: the one that cannot work is refused."""

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Refused: it offloads layer by layer.

        Raises:
            UserError: Always, naming what works.
        """
        raise UserError(
            f"sequential offloading cannot work here: {OFFLOAD_REASON}. Use "
            "enable_model_cpu_offload(), or "
            'enable_group_offload(..., offload_type="block_level", num_blocks_per_group=1)'
        )


# What the pipelines of this package have in common: components, sizes, noise, and the VAE.
#
# Schedulers, VAEs, placement, offload and progress bars are diffusers' own; the mixins add what
# they cannot know: label fields by name, guidance towards the null rows, folders that load alone.

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
        labels_in_reference_ids = read_id2label(id2label, transformer)
        channels = transformer.config.in_channels
        statistics = {len(values) for values in (latents_mean, latents_std) if values is not None}
        both = (latents_mean is None) == (latents_std is None)
        if not both or statistics - {channels} or (statistics and vae is None):
            raise UserError(
                "latents_mean and latents_std go together and with a VAE, one number for each of "
                f"the {channels} channels, not {latents_mean} and {latents_std}"
            )
        self.register_to_config(
            id2label=labels_in_reference_ids, latents_mean=latents_mean, latents_std=latents_std
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

    def _encode(self, pixels: Tensor, chunks: NetworkBatches) -> Tensor:
        """Pixels in [-1, 1] to what the transformer works on; the identity without a VAE.

        The mean of the VAE's posterior: no noise but the one that is asked for.
        """
        if self.vae is None:
            return pixels
        vae = self.vae
        latents = chunks.run(lambda x: posterior(vae, x)[0], pixels.to(vae.dtype))
        mean, std = self._latent_scale(latents)
        return (latents - mean) / std

    def _decode(self, latents: Tensor, chunks: NetworkBatches) -> Tensor:
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
        self, x: Tensor, output_type: str, return_dict: bool, chunks: NetworkBatches
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
        chunks, device = NetworkBatches(chunk_size, chunk_offset), self._execution_device
        condition = condition.repeat_interleave(num_images_per_prompt, dim=0).to(device)

        noise = self._noise(len(condition), height, width, generator, latents)
        x = self._starting_from_noise(noise)
        timesteps = set_steps(self.scheduler, num_inference_steps, device)
        x = self._denoise(
            x, condition, timesteps, network_times(self.scheduler), guidance, chunks,
            callback_on_step_end, callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        return self._finish(x, output_type, return_dict, chunks)
