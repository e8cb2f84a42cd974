"""ComplexityDiTPipeline: images from prompts and labels, as a diffusers pipeline."""

import inspect
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from complexity_dit.config import GUIDANCE
from complexity_dit.hashing import array_hash
from complexity_dit.labels import LabelTable, resolve_label
from complexity_dit.models.adapters import (
    FETCH_OPTIONS,
    label_rows,
    read_adapter,
    without_prefix,
)
from complexity_dit.models.loading import warn_of_pickles
from complexity_dit.models.text import (
    check_text_encoder,
    encode_prompts,
    text_width,
    warn_of_cut,
)
from complexity_dit.models.transformer import (
    ComplexityDiTTransformer2DModel,
    check_num_loops,
)
from complexity_dit.models.vae import Vae, posterior, scale_factor
from complexity_dit.pipelines.saving import FilesMixin
from complexity_dit.pipelines.schedulers import (
    begin_at,
    fit_scheduler,
    is_guided,
    network_times,
    noised,
    objective_of,
    predicted_clean,
    set_steps,
)
from inl_core.run.errors import UserError
from inl_core.run.files import merged_folder
from inl_core.run.json_files import fits, one_line

LabelValue = str | int | None
Labels = Mapping[str, LabelValue | Sequence[LabelValue]]
Prompts = str | Sequence[str | None] | None
Generators = torch.Generator | list[torch.Generator] | None
StepCallback = Callable[[Any, int, Tensor, dict], dict]
_OUTPUTS = ("pil", "np", "pt", "latent")
_EMBEDS = (
    "prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds",
    "negative_prompt_attention_mask",
)  # fmt: skip


@dataclass(frozen=True)
class Guidance:
    """Extrapolation of a prediction away from weaker ones, within closed noise levels.

    With the prediction p, the weaker w of the null rows or the guide, and the auxiliary output a of
    the network itself, the result is w + scale * (p - w) + (internal_scale - 1) * (p - a).
    """

    scale: float
    internal_scale: float
    interval: tuple[float, float]
    guide: ComplexityDiTTransformer2DModel | None  # None: the null rows of the network itself

    def at(self, time: Tensor) -> "Guidance":
        """The guidance at a network time in [0, 1000]: no scale acts outside of the interval."""
        names = ("scale", "internal_scale")
        off = [n for n in names if not is_guided(time, getattr(self, n), self.interval)]
        return replace(self, **dict.fromkeys(off, 1.0))

    def check(self, transformer: ComplexityDiTTransformer2DModel, condition: Tensor) -> None:
        """Refuse a bad interval, or what the network or the guide cannot do."""
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise UserError(f"guidance_interval {self.interval} must satisfy 0 <= low <= high <= 1")
        if self.internal_scale != 1 and not transformer.config.get("auxiliary_layer"):
            raise UserError(
                f"internal_guidance_scale {self.internal_scale} leads away from an auxiliary "
                "output, and this network has none: leave it at 1, or train a network with "
                "--model.auxiliary_layer"
            )
        if self.guide is None:
            return
        if condition.is_floating_point():
            raise UserError(
                "label_embeds belong to one network and mean nothing to a guide: pass class_labels"
            )
        for name in ("in_channels", "label_fields", "num_classes", "caption_channels"):
            expected, other = (n.config.get(name) for n in (transformer, self.guide))
            if expected != other:
                raise UserError(
                    f"the guide has {name} {other} and the transformer {expected}: use a network "
                    "that was trained on the same data"
                )


@dataclass(frozen=True)
class NetworkBatches:
    """Network calls on a fixed number of rows, so that bits do not depend on the batch."""

    size: int | None  # rows per call; None runs all in one
    offset: int  # position of the first row within its call

    def run(self, network: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        """Run a network on rows (B, ...), padding the first and the last call to `size` rows.

        Row i is at position (offset + i) mod size of its call, whatever the other rows are.
        """
        if self.size is None:
            return network(*rows)
        count, offset = len(rows[0]), self.offset % self.size
        padding = -(offset + count) % self.size
        padded = [
            torch.cat([x[:1].expand(offset, *x.shape[1:]), x, x[-1:].expand(padding, *x.shape[1:])])
            for x in rows
        ]
        calls = zip(*(x.split(self.size) for x in padded), strict=True)
        return torch.cat([network(*call) for call in calls])[offset : offset + count]


def read_id2label(
    id2label: Mapping | None, transformer: ComplexityDiTTransformer2DModel
) -> dict[str, dict[int, str]]:
    """Label names `{field: {id: name}}` in the transformer's field order, with integer ids.

    JSON has turned ids into strings and sorted the fields. None names each label by its id.
    """
    config = transformer.config
    fields = dict(zip(config.label_fields, config.num_classes, strict=True))
    if id2label is None:
        return {field: {i: str(i) for i in range(n)} for field, n in fields.items()}
    if not isinstance(id2label, Mapping) or not all(
        isinstance(names, Mapping) and all(isinstance(name, str) for name in names.values())
        for names in id2label.values()
    ):
        raise UserError("id2label must be {field: {id: name}} with names as strings")
    if {field: len(names) for field, names in id2label.items()} != fields:
        raise UserError(
            f"id2label names {', '.join(f'{len(v)} of {k}' for k, v in id2label.items())}; the "
            f"transformer was built for {fields}: pass the id2label it was trained with"
        )
    table = {field: {str(i): name for i, name in id2label[field].items()} for field in fields}
    for field, names in table.items():
        if set(names) != {str(i) for i in range(len(names))}:
            raise UserError(
                f"the ids of {field} in id2label are {', '.join(map(repr, list(names)[:5]))}, …; "
                f"expected 0 to {len(names) - 1}"
            )
    return {field: {int(i): name for i, name in names.items()} for field, names in table.items()}


def _merged(labels: Any, named: Mapping[str, Any]) -> dict[str, Any]:
    """Labels of a mapping and of keywords, one of which may be called `labels` as well."""
    merged = {}
    for one in (labels, named.get("labels"), {k: v for k, v in named.items() if k != "labels"}):
        # A value that is not a mapping is that of a field called "labels".
        found = {} if one is None else dict(one) if isinstance(one, Mapping) else {"labels": one}
        if twice := merged.keys() & found:
            raise UserError(f"the label field {min(twice)!r} is given twice: give it once")
        merged |= found
    return merged


def repeat_rows(rows: Tensor, count: int, repeats: int, name: str, other: str) -> Tensor:
    """One row per image: each of count / repeats rows, or a single one, `repeats` times."""
    expected = count // repeats
    if len(rows) not in (1, expected):
        raise UserError(
            f"{len(rows)} {name} for {expected} {other}: pass one for all, or one for each"
        )
    return rows.expand(expected, *rows.shape[1:]).repeat_interleave(repeats, dim=0)


class ComplexityDiTPipeline(FilesMixin, LoraBaseMixin, DiffusionPipeline):
    """Image generation from prompts, labels or both with a ComplexityDiT.

    Schedulers, VAEs, device placement and progress bars are those of diffusers. Added here are
    labels by name, guidance towards the null rows or a weaker network, adapters that bring labels,
    and folders that `DiffusionPipeline.from_pretrained` loads.

    Args:
        transformer: The denoiser; None for a text encoder alone, which only encodes prompts.
        scheduler: A scheduler of diffusers that samples from such models (`scheduler_names`). One
            that is assigned later gets the settings that the model needs, or is refused.
        vae: `AutoencoderKL`, `AutoencoderTiny` or `TinyAutoencoder` for a network that works on
            latents; None if it works on pixels.
        id2label: Label names, `{field: {id: name}}`; None names each label by its id.
        latents_mean: Mean of each latent channel in training: the VAE decodes x * std + mean. None
            uses the scaling and shift factors of the VAE's config instead.
        latents_std: Standard deviation of each latent channel; given together with the mean.
        objective: What the network was trained for, as `objective_of` returns it and a folder
            records it; None takes it from the scheduler.
        label_counts: The combinations of labels in the training pictures, as `LabelTable` reads
            them; labels that a request does not name are drawn from them. None leaves such labels
            missing.
        text_encoder: The transformers model whose hidden states a network with `caption_channels`
            reads; None for a network without, or to pass `prompt_embeds` only.
        tokenizer: Its tokenizer.
        prompt_length: Tokens of a prompt, to which all are padded; given with a text encoder.
        guidance: The guidance that suits the network (see `guidance`); None recommends none.

    Raises:
        UserError: If `id2label` or `label_counts` does not match the transformer's label fields,
            the statistics do not match its channels, the text encoder does not match the network or
            the tokenizer, the scheduler cannot sample from the model, or the guidance is not one of
            this network.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    transformer_name = "transformer"
    transformer: ComplexityDiTTransformer2DModel
    scheduler: SchedulerMixin
    vae: Vae | None
    text_encoder: Any
    tokenizer: Any
    config: Any
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "pred_original_sample"]
    _optional_components: ClassVar[list[str]] = ["vae", "text_encoder", "tokenizer"]
    _lora_loadable_modules: ClassVar[list[str]] = ["transformer"]
    _current_timestep: Tensor | None = None

    def __init__(
        self,
        transformer: ComplexityDiTTransformer2DModel,
        scheduler: SchedulerMixin,
        vae: Vae | None = None,
        id2label: dict | None = None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        objective: dict[str, Any] | None = None,
        label_counts: dict[str, int] | None = None,
        text_encoder: nn.Module | None = None,
        tokenizer: Callable | None = None,
        prompt_length: int | None = None,
        guidance: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if transformer is None and text_encoder is None:
            raise UserError("give the transformer, or a text_encoder alone to encode prompts with")
        if scheduler is not None:
            objective = objective or objective_of(scheduler)
            if not isinstance(objective, Mapping) or "prediction_type" not in objective:
                raise UserError(f"objective {objective!r} must be what objective_of returns")
            scheduler = fit_scheduler(scheduler, objective)
        elif transformer is not None:
            raise UserError("give the scheduler that the transformer was trained for")
        self.register_modules(
            transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=text_encoder,
            tokenizer=tokenizer,
        )  # fmt: skip
        self._check_text(prompt_length)
        self._label_table = None
        if transformer is not None:
            channels = transformer.config.in_channels
            lengths = {len(values) for values in (latents_mean, latents_std) if values is not None}
            both = (latents_mean is None) == (latents_std is None)
            if not both or lengths - {channels} or (lengths and vae is None):
                raise UserError(
                    "latents_mean and latents_std go together and with a VAE, one number for each "
                    f"of the {channels} channels, not {latents_mean} and {latents_std}"
                )
            id2label = read_id2label(id2label, transformer)
            self._label_table = label_counts and LabelTable(
                label_counts, transformer.config.num_classes
            )
        self.register_to_config(
            id2label=id2label,
            latents_mean=latents_mean,
            latents_std=latents_std,
            objective=objective,
            label_counts=label_counts,
            prompt_length=prompt_length,
        )
        self.guidance = guidance
        self.vae_scale_factor = scale_factor(vae) if vae is not None else 1
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scheduler" and (current := self.__dict__.get(name)) is not None:
            value = fit_scheduler(value, self.config.objective | objective_of(current))
        super().__setattr__(name, value)

    def _check_text(self, prompt_length: int | None) -> None:
        """Refuse text components that do not go together or with the network."""
        encoder, tokenizer = self.text_encoder, self.tokenizer
        if encoder is None:
            return
        if tokenizer is None or prompt_length is None:
            raise UserError("a text_encoder needs its tokenizer and a prompt_length: give both")
        check_text_encoder(tokenizer, encoder, prompt_length)
        if self.transformer is None:
            return
        if not self.reads_text:
            raise UserError(
                "the network reads no text (its caption_channels is 0): leave out text_encoder and "
                "tokenizer"
            )
        width, expected = text_width(encoder), self.transformer.config.caption_channels
        if width != expected:
            raise UserError(
                f"the states of the text encoder are {width} wide and the network reads {expected} "
                "(caption_channels): use the encoder that it was trained with"
            )

    @property
    def reads_text(self) -> bool:
        """Whether the network reads a text."""
        # A denoiser of another class, as `train` takes one, need not have the field.
        return bool(self.transformer.config.get("caption_channels"))

    @property
    def sample_size(self) -> int:
        """Default height and width of an image in pixels."""
        return self.transformer.config.sample_size * self.vae_scale_factor

    @property
    def guidance(self) -> dict[str, Any]:
        """The guidance of calls that name none: both scales, and the interval.

        Assign some of them, or None for the defaults; they are saved with the pipeline.
        """
        return GUIDANCE | (self.config.guidance or {})

    @guidance.setter
    def guidance(self, given: Mapping[str, Any] | None) -> None:
        given = None if given is None else dict(given)
        chosen = GUIDANCE | (given or {})
        *scales, interval = (chosen[name] for name in GUIDANCE)
        numbers = [*scales, *interval] if isinstance(interval, list | tuple) else []
        if chosen.keys() != GUIDANCE.keys() or len(numbers) != 4 or not fits(numbers, list[float]):
            raise UserError(
                f"guidance {given!r} must have some of {', '.join(GUIDANCE)}: two numbers, and "
                "the two ends of an interval"
            )
        if self.transformer is not None:
            Guidance(*chosen.values(), guide=None).check(self.transformer, torch.empty(0))
        self.register_to_config(guidance=given)

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        """Noise level of the current step, in [0, 1000], for the callbacks of diffusers' caches.

        None outside of a call.
        """
        return self._current_timestep

    @property
    def num_evaluations(self) -> int:
        """Network evaluations per image in the last call, those of guidance included."""
        return self._num_evaluations

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    # Labels

    @property
    def id2label(self) -> dict[str, dict[int, str]]:
        """Names by field and id: those of the network, then those of loaded adapters."""
        # A denoiser of another class, as `train` takes one, has no adapters.
        added = getattr(self.transformer, "added_labels", {})
        return {
            field: names | dict(enumerate(added.get(field, ()), len(names)))
            for field, names in self.config.id2label.items()
        }

    @property
    def label_names(self) -> dict[str, list[str]]:
        """Label names per field, in id order."""
        return {f: [names[i] for i in range(len(names))] for f, names in self.id2label.items()}

    def get_label_ids(self, labels: Labels | None = None, /, **named: Any) -> Tensor:
        """Convert labels, by name or id, to the transformer's `class_labels`.

        Args:
            labels: One value or a list per field; None (or a field left out) means not given.
                Lists must have one length; single values are repeated to it.
            **named: The same as keywords.

        Returns:
            Label ids, (B, F) int64, -1 where not given.

        Raises:
            UserError: For an unknown field or label (near names are listed) or unequal lists.
        """
        given = _merged(labels, named)
        if unknown := sorted(set(given) - set(self.id2label)):
            raise UserError(
                f"unknown label field {unknown[0]!r}; this pipeline has "
                f"{', '.join(self.id2label) or 'no label fields'}"
            )
        values = {f: v.tolist() if hasattr(v, "tolist") else v for f, v in given.items()}
        lengths = {f: len(v) for f, v in values.items() if isinstance(v, list | tuple)}
        if len(set(lengths.values())) > 1 or 0 in lengths.values():
            raise UserError(f"lists of labels must be of one length above 0, got {lengths}")
        batch = next(iter(lengths.values()), 1)
        columns = []
        for field, names in self.label_names.items():
            value: Any = values.get(field)
            column = value if field in lengths else [value] * batch
            columns.append([resolve_label(names, value, field) for value in column])
        return torch.tensor(columns, dtype=torch.long).reshape(len(columns), batch).T.contiguous()

    def fill_labels(self, class_labels: Tensor, shares: Sequence[float]) -> Tensor:
        """Draw the labels that are not given from the training pictures that have the given ones.

        Args:
            class_labels: Label ids, (B, F), -1 where not given, as `get_label_ids` returns them.
            shares: One uniform random number in [0, 1) per row.

        Returns:
            Label ids, (B, F): those of a training picture, drawn together. Unchanged where no
            picture has the given labels, and if the pipeline does not know which occur together.
        """
        if not self._label_table:
            return class_labels
        filled = self._label_table.fill(class_labels.cpu().numpy(), shares)
        return torch.from_numpy(filled).to(class_labels.device)

    def _filled_by_noise(self, class_labels: Tensor, noise: Tensor) -> Tensor:
        """`fill_labels` by a hash of an image's noise, which is the same in every batch."""
        hashes = [array_hash(one.float().cpu().numpy()) for one in noise]
        return self.fill_labels(class_labels, [int(h[:13], 16) / 16**13 for h in hashes])

    @torch.no_grad()
    def get_label_embeds(self, labels: Labels | None = None, /, **named: Any) -> Tensor:
        """Embeddings of labels, (B, D), to blend and to pass as `label_embeds`.

        Args:
            labels: As for `get_label_ids`.
            **named: The same as keywords.
        """
        ids = self.get_label_ids(labels, **named).to(self._execution_device)
        return self.transformer.embed_labels(ids)

    def _condition(
        self, class_labels: Any, label_embeds: Tensor | None, labels: Mapping[str, Any]
    ) -> Tensor:
        """Label ids (B, F) or embeddings (B, D) from whichever of three arguments was given."""
        tensors = {"class_labels": class_labels, "label_embeds": label_embeds}
        given = [name for name, tensor in tensors.items() if tensor is not None]
        if given and len(given) + len(labels) > 1:
            raise UserError(f"give {given[0]} or {', '.join([*given[1:], *labels])}, not both")
        if label_embeds is not None:
            width = self.transformer.config.hidden_size
            if label_embeds.ndim != 2 or label_embeds.shape[1] != width:
                raise UserError(
                    f"label_embeds of shape {tuple(label_embeds.shape)} must be (B, {width}), as "
                    "get_label_embeds returns them"
                )
            return label_embeds
        return self.get_label_ids(labels) if class_labels is None else self._ids(class_labels)

    def _ids(self, class_labels: Any) -> Tensor:
        """Label ids (B, F) from a tensor, array or list of them; (B,) for one field."""
        fields = {field: len(names) for field, names in self.label_names.items()}
        try:
            ids = torch.as_tensor(class_labels)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"class_labels are not numbers ({error}): pass ids") from error
        ids = ids[:, None] if ids.ndim == len(fields) == 1 else ids
        if ids.is_floating_point() or ids.dtype == torch.bool or ids.is_complex():
            raise UserError(f"class_labels of {ids.dtype} must be integers: ids of the labels")
        if ids.ndim != 2 or ids.shape[1] != len(fields) or not len(ids):
            raise UserError(
                f"class_labels of shape {tuple(ids.shape)} must be (images, {len(fields)}): one "
                f"column per label field ({', '.join(fields) or 'none'})"
            )
        for (field, count), column in zip(fields.items(), ids.T, strict=True):
            if wrong := [i for i in column.tolist() if not -1 <= i < count]:
                raise UserError(
                    f"class_labels have {wrong[0]} for {field}, whose ids are 0 to {count - 1}, "
                    "and -1 for not given"
                )
        return ids.long()

    # Text

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: Prompts,
        negative_prompt: Prompts = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Hidden states of prompts, to change and to pass as `prompt_embeds` and so on.

        Each prompt is encoded by itself, so that its bits do not depend on the others.

        Args:
            prompt: One or B; an empty one is the null text.
            negative_prompt: One for all or B, likewise.

        Returns:
            `prompt_embeds` (B, T, C), `prompt_attention_mask` (B, T), `negative_prompt_embeds` and
            `negative_prompt_attention_mask`, (1 or B, ...).

        Raises:
            UserError: If the pipeline has no text encoder, or a prompt is no text or has control
                characters.
        """
        if self.text_encoder is None:
            raise UserError(self.no_prompts(prompt or negative_prompt))
        found: list[Tensor] = []
        for texts in (prompt, negative_prompt):
            texts = list(texts) if isinstance(texts, list | tuple) else [texts]
            if not texts:
                raise UserError("the list of prompts is empty: give one or more")
            warn_of_cut(self.tokenizer, texts, self.config.prompt_length)
            known = {
                text: encode_prompts(
                    self.tokenizer, self.text_encoder, [text], self.config.prompt_length,
                    self._execution_device,
                )
                for text in dict.fromkeys(texts)
            }  # fmt: skip
            found += [torch.cat(rows) for rows in zip(*(known[t] for t in texts), strict=True)]
        return found[0], found[1], found[2], found[3]

    def no_prompts(self, prompts: Prompts) -> str:
        """What to write in place of a prompt, for a pipeline without text encoder."""
        prompt = next(iter(prompts), None) if isinstance(prompts, list | tuple) else prompts
        if self.reads_text:
            return f"prompt {prompt!r} needs the text encoder, and the pipeline was loaded without"
        if not self.id2label:
            return f"prompt {prompt!r}: this model has neither a text encoder nor label fields"
        examples = {field: names[0] for field, names in reversed(self.label_names.items())}
        for field, names in self.label_names.items():
            with suppress(UserError):
                if (found := resolve_label(names, prompt, field)) >= 0:
                    examples = {field: names[found]}
                    break
        field, name = examples.popitem()
        return (
            f"prompt {prompt!r}: this model has no text encoder, and takes labels "
            f"({', '.join(self.id2label)}): write {field}={name!r}, or on a command line "
            f"--labels.{field} {shlex.quote(one_line(name))}"
        )

    def _texts(self, call: SimpleNamespace) -> tuple[Tensor, ...]:
        """Hidden states and mask of the prompts and of the negative ones; nothing without text."""
        asked = {"prompt": call.prompt, "negative_prompt": call.negative_prompt}
        given = {name: getattr(call, name) for name in _EMBEDS}
        for name, prompts in asked.items():
            if prompts is not None and given[f"{name}_embeds"] is not None:
                raise UserError(f"give {name} or {name}_embeds, not both")
        if not self.reads_text:
            if any(prompts is not None for prompts in asked.values()):
                raise UserError(self.no_prompts(call.prompt or call.negative_prompt))
            if wrong := [name for name, value in given.items() if value is not None]:
                raise UserError(f"{wrong[0]}: the network of this pipeline reads no text")
            return ()
        rows: list[Tensor] = []
        encoded = None
        if any(prompts is not None for prompts in asked.values()):
            encoded = self.encode_prompt(call.prompt, call.negative_prompt)
        width, length = self.transformer.config.caption_channels, self.config.prompt_length or 1
        for i, name in enumerate(asked):
            states, mask = given[f"{name}_embeds"], given[_EMBEDS[2 * i + 1]]
            if states is None:
                if mask is not None:
                    raise UserError(f"{_EMBEDS[2 * i + 1]} needs {name}_embeds")
                if encoded is not None:
                    states, mask = encoded[2 * i : 2 * i + 2]
                else:
                    states = torch.zeros(1, length, width)
                    mask = torch.zeros(1, length, dtype=torch.bool)
            elif states.ndim != 3 or states.shape[2] != width or 0 in states.shape:
                raise UserError(
                    f"{name}_embeds of shape {tuple(states.shape)} must be (B, T, {width}), as "
                    "encode_prompt returns them"
                )
            mask = torch.ones(states.shape[:2]) if mask is None else mask
            if mask.shape != states.shape[:2]:
                raise UserError(
                    f"{_EMBEDS[2 * i + 1]} of shape {tuple(mask.shape)} must be "
                    f"{tuple(states.shape[:2])}"
                )
            rows += [states, mask.bool()]
        # One length, because prompts and negative ones may run in one call.
        longest = max(rows[0].shape[1], rows[2].shape[1])
        return tuple(
            nn.functional.pad(row, (0, 0) * (row.ndim - 2) + (0, longest - row.shape[1]))
            for row in rows
        )

    def _check_names(self, call: SimpleNamespace) -> None:
        """Refuse the name of a label where an argument of the same name as its field was set."""
        for field in self.id2label:
            value = None if field in ("labels", "named") else vars(call).get(field)
            if field in ("prompt", "negative_prompt") and self.reads_text:
                continue
            first = value[0] if isinstance(value, list) and value else value
            if isinstance(first, str) and first not in (*_OUTPUTS, "latents"):
                raise UserError(
                    f"{field} is an argument of the pipeline and a label field of this one: ask "
                    f"for the label with labels={{{field!r}: {value!r}}}"
                )
        count = call.num_images_per_prompt
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            fields = list(self.id2label) or ["style"]
            raise UserError(
                f"num_images_per_prompt {count!r} must be a whole number above 0; labels are "
                f"keywords: pipe({fields[0]}=...)"
            )

    # Sampling

    @torch.no_grad()
    def __call__(
        self,
        /,
        prompt: Prompts = None,
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
        negative_prompt: Prompts = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        **named: Any,
    ) -> ImagePipelineOutput | tuple:
        """Generate images.

        Without a prompt, labels that are not named are those of a random training picture that has
        the named ones, so that an image has labels that occur together (`LabelTable`). Beside a
        prompt they are missing.

        Args:
            prompt: One text, or a list, of which each is an image; for models with a text encoder.
                None and an empty one are the null text.
            num_images_per_prompt: Images per prompt, or combination of labels.
            height: Height in pixels, a multiple of patch size times VAE factor; None means the
                training size.
            width: Width in pixels, likewise.
            num_inference_steps: Denoising steps; each is one evaluation of the network, or two with
                a second-order scheduler such as Heun's (`num_evaluations` counts them).
            guidance_scale: Classifier-free guidance (Ho & Salimans, arXiv 2207.12598); 1 is off.
                None is the scale of `guidance`, as for the other two arguments of guidance.
            guidance_interval: Noise levels in [0, 1] within which guidance acts (Kynkäänniemi et
                al., arXiv 2404.07724); outside it the conditional prediction is used alone.
            guide: A weaker network for the same labels and objective, e.g. an earlier checkpoint or
                a smaller model: guidance then leads away from its prediction for the same labels
                instead of away from the null rows (autoguidance; Karras et al., arXiv 2406.02507).
                It must be on the pipeline's device.
            generator: One generator, or one per image: then image i does not depend on the others.
                CPU generators give the same noise on every device.
            latents: Initial noise, (B, C, Y, X); drawn from `generator` when None.
            class_labels: Label ids, (B, F) with -1 for none, in place of `labels` and taken as they
                are: a tensor, an array or a list; (B,) for one field.
            label_embeds: Label embeddings, (B, D), in place of `labels`: `get_label_embeds` returns
                them, and a blend of two gives an image between two labels.
            chunk_size: Run the networks on exactly this many images per call, padding the last one.
                Floating-point kernels may give other bits for another batch size; at a fixed
                chunk size the bits of an image do not depend on how many are generated with it.
            chunk_offset: Position of the first image within its chunk.
            output_type: "pil", "np" (B, Y, X, C in [0, 1]), "pt" (B, C, Y, X) or "latent".
            return_dict: False returns a plain tuple.
            callback_on_step_end: Called as (pipeline, step, timestep, tensors) after each step; it
                may return replaced tensors, and may set `pipeline._interrupt`.
            callback_on_step_end_tensor_inputs: Tensors that the callback gets: "latents", which it
                may replace, and "pred_original_sample", the clean image that the network predicts
                at this step, in the form of latents.
            labels: Labels by field: a name, an id, None, or a list of these.
            attention_kwargs: `{"scale": s}` multiplies the strength of the adapters in this call.
            internal_guidance_scale: Guidance away from the auxiliary output of the network itself
                (Zhou et al., arXiv 2512.24176) in the same interval, without a further evaluation;
                1 is off. If both scales are on, their two steps are added.
            num_loops: Repetitions of the loop of a network that has one; None means those of its
                config. A `guide` has its own.
            negative_prompt: What guidance leads away from, one text for all or one each, in place
                of the null text.
            prompt_embeds: Hidden states of prompts, (B, T, C), as `encode_prompt` returns them, in
                place of `prompt`.
            prompt_attention_mask: True at their tokens, (B, T); None means at all.
            negative_prompt_embeds: The same for negative prompts.
            negative_prompt_attention_mask: Likewise.
            **named: The same as keywords, `style="Cubism"`; a field with the name of an argument,
                such as `height`, can be asked for by `labels={"height": ...}` only.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple of them.

        Raises:
            UserError: For unknown labels, sizes that do not fit, lists of unequal length, or a
                prompt for a model without text encoder.
        """
        return self._sample(SimpleNamespace(**locals()))

    def _sample(
        self,
        call: SimpleNamespace,
        image: Tensor | None = None,
        mask: Tensor | None = None,
        strength: float = 1.0,
    ) -> ImagePipelineOutput | tuple:
        """Sample from noise, from an image under noise, or inside a mask.

        `call` has the arguments of `__call__`. `image` is what to start from, (1 or B, 3, Y, X) in
        [-1, 1], with that `strength`; `mask` is 1 where it is replaced and 0 where it is kept, (1
        or B, 1, Y, X).
        """
        if self.transformer is None or self.scheduler is None:
            raise UserError(
                "this pipeline has no transformer or no scheduler: it can encode prompts only"
            )
        self._check_names(call)
        options = {"attention_kwargs": call.attention_kwargs, "num_loops": call.num_loops}
        # A denoiser of another class, as `train` takes one, need not know them.
        self._options = {name: value for name, value in options.items() if value is not None}
        if call.num_loops is not None:
            try:
                check_num_loops(self.transformer.config, call.num_loops)
            except ValueError as error:
                raise UserError(str(error)) from error
        steps = call.num_inference_steps
        if steps < 1:
            raise UserError(f"num_inference_steps {steps} must be at least 1")
        if not 0 <= strength <= 1:
            raise UserError(
                f"strength {strength} must be from 0 (the image as it is) to 1 (a new one)"
            )
        if call.output_type not in _OUTPUTS:
            raise UserError(f"output_type {call.output_type!r} must be pil, np, pt or latent")
        for name in call.callback_on_step_end_tensor_inputs:
            if name not in self._callback_tensor_inputs:
                raise UserError(
                    f"callback tensor {name!r} must be one of {self._callback_tensor_inputs}"
                )
        if image is None:
            height, width = (side or self.sample_size for side in (call.height, call.width))
        else:
            height, width = (side * self._cell(image) for side in image.shape[-2:])
        multiple = self.transformer.config.patch_size * self.vae_scale_factor
        if height < 1 or width < 1 or height % multiple or width % multiple:
            raise UserError(
                f"height {height} and width {width} must be positive multiples of {multiple} "
                f"(patch {self.transformer.config.patch_size} x VAE {self.vae_scale_factor})"
            )
        condition = self._condition(
            call.class_labels, call.label_embeds, _merged(call.labels, call.named)
        )
        asked = {name: getattr(call, name) for name in GUIDANCE}
        asked = {name: value for name, value in asked.items() if value is not None}
        guidance = Guidance(*(self.guidance | asked).values(), guide=call.guide)
        guidance.check(self.transformer, condition)
        texts = self._texts(call)
        if call.guide is None and not (
            condition.is_floating_point() or self.transformer.config.label_fields or texts
        ):
            # Without both, the prediction with them is the one without, at twice the cost.
            guidance = replace(guidance, scale=1.0)
        batches, device = NetworkBatches(call.chunk_size, call.chunk_offset), self._execution_device

        repeats = call.num_images_per_prompt
        count = max(len(rows) for rows in (condition, *texts, image) if rows is not None) * repeats
        condition = repeat_rows(condition, count, repeats, "labels", "images").to(device)
        texts = tuple(repeat_rows(t, count, repeats, "prompts", "images") for t in texts)
        noise = self._noise(count, height, width, call.generator, call.latents)
        decided = (call.class_labels, call.label_embeds, call.prompt, call.prompt_embeds)
        if image is None and all(one is None for one in decided):
            condition = self._filled_by_noise(condition, noise)
        set_steps(self.scheduler, steps, device)
        # Flow-matching schedulers start from unit noise and have no init_noise_sigma.
        x = noise * getattr(self.scheduler, "init_noise_sigma", 1.0)
        first = 0
        after_step: Callable[[int, Tensor], Tensor] | None = None
        if image is not None:
            image = repeat_rows(image, count, repeats, "images", "labels").to(noise)
            clean = self._encode(image, batches) if image.shape[1] == 3 else image
            clean = clean.to(noise.dtype)
            first = begin_at(self.scheduler, steps, strength)
            if first > 0:
                x = noised(self.scheduler, clean, noise, first)
            if mask is not None:
                mask = repeat_rows(mask, count, repeats, "masks", "images").to(noise)
                # A latent is replaced if any of its pixels is.
                factor = self.vae_scale_factor
                cells = torch.nn.functional.max_pool2d(mask, factor) if factor > 1 else mask

                def put_back(step: int, x: Tensor) -> Tensor:
                    # The step has led to the noise level of the next one; after the last, to none.
                    kept = noised(self.scheduler, clean, noise, first + step + 1)
                    return torch.where(cells > 0, x, kept)

                after_step = put_back

        x = self._denoise(
            x, condition, texts, first, guidance, batches, call.generator,
            call.callback_on_step_end, call.callback_on_step_end_tensor_inputs, after_step,
        )  # fmt: skip
        images: Any = x
        if call.output_type != "latent":
            pixels = self._decode(x, batches)
            if image is not None and mask is not None:
                pixels = torch.where(mask > 0, pixels, image.to(pixels))
            images = self.image_processor.postprocess(pixels, output_type=call.output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if call.return_dict else (images,)

    def _cell(self, image: Tensor) -> int:
        """Pixels along one side of an element of `image`: those of the VAE if it is latents."""
        return 1 if image.shape[1] == 3 else self.vae_scale_factor

    def _noise(
        self, batch: int, height: int, width: int, generator: Generators, latents: Tensor | None
    ) -> Tensor:
        """Unit noise for images of a size in pixels: drawn, or `latents` if their shape fits."""
        device, dtype = self._execution_device, self.transformer.dtype
        channels, factor = self.transformer.config.in_channels, self.vae_scale_factor
        shape = (batch, channels, height // factor, width // factor)
        if isinstance(generator, list) and len(generator) != batch:
            raise UserError(f"{len(generator)} generators for {batch} images: pass one for each")
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        if tuple(latents.shape) != shape:
            raise UserError(f"latents of shape {tuple(latents.shape)} must be {shape}")
        return latents.to(device, dtype)

    def _denoise(
        self,
        x: Tensor,
        condition: Tensor,
        texts: tuple[Tensor, ...],
        first: int,
        guidance: Guidance,
        batches: NetworkBatches,
        generator: Generators,
        callback: StepCallback | None,
        callback_tensors: Sequence[str],
        after_step: Callable[[int, Tensor], Tensor] | None,
    ) -> Tensor:
        """Run the scheduler from timestep number `first`, whose noise level `x` has, to the last.

        `after_step` maps the number of a step and its result, before the callback gets it.
        """
        timesteps = self.scheduler.timesteps[first:]
        times = network_times(self.scheduler)[first:]
        self._guidance_scale, self._interrupt, self._num_evaluations = guidance.scale, False, 0
        self._num_timesteps = len(timesteps)
        dtype = self.transformer.dtype
        texts = tuple(t.to(x.device, dtype if t.is_floating_point() else t.dtype) for t in texts)
        # Noise of a stochastic scheduler; the others have no such argument, or make no use of it.
        draws = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if draws else {}
        caches = getattr(self.transformer, "is_cache_enabled", False)
        if caches and (batches.size is not None or guidance.internal_scale != 1):
            raise UserError(
                "a cache of diffusers holds the state of one network call a step, and may skip the "
                "block of the auxiliary output: leave out chunk_size and internal_guidance_scale, "
                "or call transformer.disable_cache()"
            )
        was_guided = None
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self._interrupt:
                    break
                model_input = x
                if hasattr(self.scheduler, "scale_model_input"):
                    model_input = self.scheduler.scale_model_input(x, t)
                active = guidance.at(times[i])
                if caches and (active.scale != 1) != was_guided:  # another number of rows
                    self.transformer._reset_stateful_cache()
                was_guided, self._current_timestep = active.scale != 1, times[i]
                prediction = self._predict(
                    model_input.to(dtype), times[i], condition, texts, active, batches
                )
                self._num_evaluations += 1 + (active.scale != 1)
                x = self.scheduler.step(prediction, t, x, return_dict=False, **extra)[0]
                if after_step is not None:
                    x = after_step(i, x)
                if callback is not None:
                    tensors = dict.fromkeys(callback_tensors, x)
                    if "pred_original_sample" in tensors:
                        tensors["pred_original_sample"] = predicted_clean(
                            self.scheduler, model_input, prediction, times[i]
                        )
                    x = callback(self, i, t, tensors).get("latents", x)
                progress_bar.update()
        self._current_timestep = None
        return x

    def _predict(
        self,
        x: Tensor,
        t: Tensor,
        condition: Tensor,
        texts: tuple[Tensor, ...],
        guidance: Guidance,
        batches: NetworkBatches,
    ) -> Tensor:
        """The transformer's prediction, led away from weaker ones where a scale is not 1."""
        scale, internal, guide = guidance.scale, guidance.internal_scale, guidance.guide
        options = self._options | ({"return_auxiliary": True} if internal != 1 else {})
        caches = getattr(self.transformer, "is_cache_enabled", False)

        def predict(x: Tensor, condition: Tensor, *texts: Tensor) -> Tensor:
            text, negative = texts[:2], texts[2:]
            own, weak = (x, condition, *text), None
            if scale != 1 and guide is None:
                halves = [own, (x, self._null(condition), *negative)]
                if caches:  # FasterCache expects the rows without labels first
                    halves.reverse()
                own = tuple(torch.cat(rows) for rows in zip(*halves, strict=True))
            strong, *auxiliary = _run(self.transformer, t, *own, **options)
            if scale != 1 and guide is not None:
                seen = [row.to(guide.dtype) for row in text[:1]] + list(text[1:])
                weak = _run(guide, t, x.to(guide.dtype), condition, *seen)[0].to(strong)
            elif scale != 1:
                strong, weak = reversed(strong.chunk(2)) if caches else strong.chunk(2)
            guided = strong if weak is None else weak + scale * (strong - weak)
            if auxiliary:
                guided = guided + (internal - 1) * (strong - auxiliary[0][: len(x)])
            return guided

        return batches.run(predict, x, condition, *texts)

    def _null(self, condition: Tensor) -> Tensor:
        """The condition that means "not given", in the form of `condition`."""
        if not condition.is_floating_point():
            return torch.full_like(condition, -1)
        fields = len(self.transformer.config.label_fields)
        missing = torch.full((len(condition), fields), -1, device=condition.device)
        return self.transformer.embed_labels(missing).to(condition)

    # The VAE; without one these are the identity.

    def _encode(self, pixels: Tensor, batches: NetworkBatches) -> Tensor:
        """Pixels in [-1, 1] to the transformer's input: the mean of the VAE's posterior, scaled."""
        if self.vae is None:
            if pixels.shape[1] != (channels := self.transformer.config.in_channels):
                raise UserError(
                    f"the image has {pixels.shape[1]} channels and the network {channels}: the "
                    "pipeline has no VAE, give image as latents"
                )
            return pixels
        vae = self.vae
        latents = batches.run(lambda x: posterior(vae, x)[0], pixels.to(vae.dtype))
        mean, std = self._latent_scale(latents)
        return (latents - mean) / std

    def _decode(self, latents: Tensor, batches: NetworkBatches) -> Tensor:
        """The transformer's output to pixels in [-1, 1]."""
        if self.vae is None:
            return latents
        vae = self.vae
        if self.config.latents_mean is not None:
            mean, std = self._latent_scale(latents)
            latents = latents * std + mean
        else:
            shift = getattr(vae.config, "shift_factor", None) or 0.0
            latents = latents / vae.config.scaling_factor + shift
        return batches.run(lambda z: vae.decode(z, return_dict=False)[0], latents.to(vae.dtype))

    def _latent_scale(self, latents: Tensor) -> tuple[Any, Any]:
        """Mean and standard deviation of the VAE's latents in training, (C, 1, 1) or scalars."""
        if self.config.latents_mean is not None:
            mean, std = (
                torch.tensor(values, device=latents.device).view(-1, 1, 1)
                for values in (self.config.latents_mean, self.config.latents_std)
            )
            return mean, std
        config = self.vae.config  # pyright: ignore
        return getattr(config, "shift_factor", None) or 0.0, 1 / config.scaling_factor

    # Adapters: LoRA matrices, and the labels that come with them (see `models.adapters`)

    @classmethod
    def lora_state_dict(cls, source: Any, **kwargs: Any) -> Any:  # pyright: ignore
        """An adapter's tensors by name; with `return_lora_metadata`, PEFT's settings too."""
        with_metadata = kwargs.pop("return_lora_metadata", False)
        tensors, metadata = read_adapter(source, **kwargs)
        return (tensors, metadata) if with_metadata else tensors

    def load_lora_weights(  # pyright: ignore
        self, source: Any, adapter_name: str | None = None, **kwargs: Any
    ) -> None:
        """Load an adapter; its new labels can then be used by name.

        Args:
            source: A folder, a safetensors file, a Hub id, or tensors by name.
            adapter_name: Its name for `set_adapters`, `fuse_lora` and `delete_adapters`.
            **kwargs: As for `load_lora_adapter` of the transformer.

        Raises:
            UserError: If the adapter does not exist, was trained on another network, or brings
                a label that the pipeline has already.
        """
        fetching = {k: kwargs.pop(k) for k in FETCH_OPTIONS if k in kwargs}
        tensors, metadata = read_adapter(source, **fetching)
        prefix = self.transformer_name
        if not without_prefix(tensors, prefix):
            raise UserError(
                f"no tensor of the adapter begins with {prefix!r}: it is of another kind of network"
            )
        for field, rows in label_rows(without_prefix(tensors, prefix)).items():
            for name in rows:
                if name in self.label_names.get(field, ()):
                    raise UserError(
                        f"the adapter brings {field} {name!r}, which this pipeline has: load it "
                        "into the pipeline it was trained on"
                    )
        if metadata is not None:
            metadata = without_prefix(metadata, prefix)
        self.transformer.load_lora_adapter(
            tensors, prefix=prefix, adapter_name=adapter_name, metadata=metadata, _pipeline=self,
            **kwargs,
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
        """Write an adapter folder; the layers are `transformer.adapter_state_dict()`."""
        if not safe_serialization:
            warn_of_pickles()
        with merged_folder(Path(save_directory)) as folder:
            cls._save_lora_weights(
                folder, {cls.transformer_name: transformer_lora_layers},
                {cls.transformer_name: transformer_lora_adapter_metadata}, is_main_process,
                weight_name, save_function,  # pyright: ignore
            )  # fmt: skip

    def fuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Merge adapters into the weights (`lora_scale`, `safe_fusing`, `adapter_names`).

        Raises:
            UserError: For a scale of 0, which merges nothing and could not be undone.
        """
        if kwargs.get("lora_scale") == 0:
            raise UserError("lora_scale 0 merges nothing: use disable_lora() to paint without")
        super().fuse_lora(components or self._lora_loadable_modules, **kwargs)

    def unfuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Undo `fuse_lora`, while the adapters are loaded."""
        super().unfuse_lora(components or self._lora_loadable_modules, **kwargs)
        self.transformer.undo_scale()


def _run(
    network: ComplexityDiTTransformer2DModel,
    t: Tensor,
    x: Tensor,
    condition: Tensor,
    *text: Tensor,
    **options: Any,
) -> tuple[Tensor, ...]:
    names = ("encoder_hidden_states", "encoder_attention_mask")
    options |= dict(zip(names, text, strict=False))
    if getattr(network, "is_cache_enabled", False):  # FasterCache splits rows given by name
        name = "label_embeds" if condition.is_floating_point() else "class_labels"
        options |= {"hidden_states": x, "timestep": t.expand(len(x)), name: condition}
        with network.cache_context("step"):
            return network(return_dict=False, **options)
    if condition.is_floating_point():
        return network(x, t, label_embeds=condition, return_dict=False, **options)
    return network(x, t, condition, return_dict=False, **options)
