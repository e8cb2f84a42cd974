"""The network of a run: new, started from a trained one, or frozen with an adapter to train."""

import copy
import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from complexity_dit.config import LoraOptions, TrainConfig
from complexity_dit.data.latents import (
    LatentDataset,
    LatentSpace,
    TrainingData,
    folder_of,
    read_cache,
    source_config,
)
from complexity_dit.hashing import weights_sha256
from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel, check_bypass
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.pipelines.sampling import find_pipeline, load_pipeline
from complexity_dit.pipelines.schedulers import prediction_type
from complexity_dit.training.state import SavedAdapter, check_meaning, check_shapes
from inl_core.run.errors import UserError
from inl_core.run.settings import nearest

logger = logging.getLogger(__name__)


def build_model(config: TrainConfig, data: TrainingData) -> ComplexityDiTTransformer2DModel:
    """A new network with one label table for each field of the data."""
    own = config.model.resolved()
    same = (
        "patch_size", "dynamics_placement", "dynamics_adaptive", "token_drop_start",
        "token_drop_end", "auxiliary_layer", "num_loops",
    )  # fmt: skip
    settings = {name: getattr(own, name) for name in same} | {
        "sample_size": data.sample_size,
        "in_channels": data.channels,
        "label_fields": list(data.label_names),
        "num_classes": [len(names) for names in data.label_names.values()],
        "network_output": "sample" if config.objective.writes_sample else "target",
    }
    for name in own.overrides:
        known = list(inspect.signature(ComplexityDiTTransformer2DModel.__init__).parameters)
        if name not in known:
            raise UserError(f"model.overrides has no field {name!r}{nearest(name, known)}")
    try:
        model = ComplexityDiTTransformer2DModel.from_size(own.size, **(settings | own.overrides))
    except (TypeError, ValueError) as error:
        raise UserError(f"this model cannot be built: {error}") from error
    if own.token_drop_rate:
        try:
            check_bypass(model.config)
        except ValueError as error:
            raise UserError(f"token_drop_rate {own.token_drop_rate}: {error}") from error
    return model


# Fine-tuning: a new network that starts from the weights of a trained one.


def start_from(
    model: ComplexityDiTTransformer2DModel,
    source: ComplexityDiTPipeline,
    label_names: Mapping[str, Sequence[str]],
    name: str,
    text_encoder: Any = None,
) -> None:
    """Copy the weights of a trained network into a new one.

    Labels are matched by field and name. A label that the pipeline does not have starts from the
    null row of its field, and a new field from zeros, so that at first such an image is treated as
    one without that label. A field that the data do not have is missing from now on: its null row
    is added to the bias that it was always summed with. A text encoder is copied too; what reads
    captions is new if the pipeline reads none. Networks that differ in more than that and in image
    size are refused.

    Args:
        model: The new network, changed in place.
        source: The pipeline of the trained one.
        label_names: Of the data, in id order: the rows of the new network's label tables.
        name: Of the pipeline, for messages.
        text_encoder: That of the new network, changed in place.
    """
    reader = source.text_encoder
    check_meaning(source.transformer.config, model.config, f"--init_from {name}")
    old, new = (
        {name: p for name, p in network.named_parameters() if "label_embed." not in name}
        for network in (source.transformer, model)
    )
    if reader is None:
        new = {key: p for key, p in new.items() if "caption_" not in key}
    check_shapes(old, new, f"--init_from {name}")
    if reader is not None and text_encoder is not None:
        states = reader.state_dict()
        check_shapes(states, text_encoder.state_dict(), f"the text encoder of {name}")
        text_encoder.load_state_dict(states)
    with torch.no_grad():
        for key, parameter in new.items():
            parameter.copy_(old[key])
        for field, names in label_names.items():
            model.label_embed[field].weight.copy_(_label_table(source, field, names))
        for field in source.label_names:
            if field not in label_names:
                model.time_embed.linear_2.bias += source.transformer.label_embed[field].weight[-1]
    logger.info("started from the weights of %s", name)


def _label_table(source: ComplexityDiTPipeline, field: str, names: Sequence[str]) -> Tensor:
    """The new table of a field, (len(names) + 1, D), with the null row at the end."""
    if field not in source.label_names:
        logger.info("label field %s is new: all of its %d names start at zero", field, len(names))
        return torch.zeros(len(names) + 1, source.transformer.config.hidden_size)
    known = source.label_names[field]
    if new := [name for name in names if name not in known]:
        logger.info("new %s names start from the null row: %s", field, ", ".join(new))
    null = len(known)
    chosen = [known.index(name) if name in known else null for name in names]
    return source.transformer.label_embed[field].weight.detach()[[*chosen, null]]


# Adapters: the frozen network of a pipeline, with matrices of PEFT and rows for new labels.


def adapt(
    config: TrainConfig, data: TrainingData, heldout: TrainingData | None
) -> tuple[ComplexityDiTTransformer2DModel, SavedAdapter, TrainingData, TrainingData | None]:
    """The network of `config.init_from` with an adapter to train.

    Labels that the base has keep its ids; the adapter adds the others. Returned are the network,
    the parts that are saved with it, and both sides of the data with the ids of the base.
    """
    options = config.lora
    if find_spec("peft") is None:
        raise UserError("adapters need PEFT: pip install 'complexity-dit[lora]'")
    if config.init_from is None:
        raise UserError(
            f"lora.rank {options.rank} trains an adapter of a pipeline: name it with --init_from"
        )
    if config.model.token_drop_rate:
        raise UserError("an adapter is trained on all tokens: leave model.token_drop_rate at 0")
    base = load_pipeline(config.init_from)
    if base.transformer.added_labels:
        raise UserError(f"--init_from {config.init_from} is an adapter: give a full pipeline")
    _check_objective(config, base)
    data = _use_labels_of(base, _use_space_of(base, data, config), options.labels)
    if heldout is not None:
        heldout = _use_labels_of(base, _use_space_of(base, heldout, config), options.labels)
    pictures, space = asdict(source_config(config.data)), None
    if base.vae is not None:
        space = LatentSpace(base.vae, base.config.latents_mean, base.config.latents_std, pictures)
    saved = SavedAdapter(
        base.scheduler, base.id2label, pictures, space, base.config.label_counts,
        base=str(find_pipeline(Path(config.init_from)) or config.init_from),
        base_sha256=weights_sha256(base.transformer),
    )  # fmt: skip
    return _add_adapter(base, data, options, config.seed), saved, data, heldout


def _add_adapter(
    base: ComplexityDiTPipeline, data: TrainingData, options: LoraOptions, seed: int
) -> ComplexityDiTTransformer2DModel:
    from peft import LoraConfig  # an extra

    network = base.transformer.train()
    torch.manual_seed(seed)
    settings = LoraConfig(
        r=options.rank,
        lora_alpha=options.rank if options.alpha is None else options.alpha,  # pyright: ignore
        lora_dropout=options.dropout,
        target_modules=list(options.targets),
    )
    try:
        network.add_adapter(settings)
    except ValueError as error:  # no layer has such a name
        raise UserError(f"lora.targets {options.targets}: {error}") from error
    known = base.id2label
    new = {f: n[len(known[f]) :] for f, n in data.label_names.items() if len(n) > len(known[f])}
    network.add_labels(new)
    logger.info(
        "an adapter of rank %d for %s: %d trainable parameters; new labels: %s",
        options.rank, " ".join(options.targets),
        sum(p.numel() for p in network.parameters() if p.requires_grad),
        "; ".join(f"{field} {', '.join(names)}" for field, names in new.items()) or "none",
    )  # fmt: skip
    return network


def _check_objective(config: TrainConfig, base: ComplexityDiTPipeline) -> None:
    objective = config.objective
    output = "sample" if objective.writes_sample else "target"
    for name, current, expected in (
        ("prediction_type", objective.prediction_type, prediction_type(base.scheduler)),
        ("network_output", output, base.transformer.config.network_output),
    ):
        if current != expected:
            raise UserError(
                f"the objective's {name} is {current}, and {config.init_from} was trained with "
                f"{expected}: set --objective.{name} {expected}"
            )


def _use_space_of(
    base: ComplexityDiTPipeline, data: TrainingData, config: TrainConfig
) -> TrainingData:
    """The data in the space of the base: its image size, its VAE, the scale of its latents."""
    network = base.transformer.config
    if isinstance(data, LatentDataset) != (base.vae is not None):
        expected = "latents, made by `encode`" if base.vae is not None else "pixels"
        raise UserError(f"{config.init_from} is trained on {expected}: set data.source accordingly")
    if (data.channels, data.sample_size) != (network.in_channels, network.sample_size):
        raise UserError(
            f"the data are {data.channels} channels of {data.sample_size} x {data.sample_size}, "
            f"and {config.init_from} samples {network.in_channels} of {network.sample_size} x "
            f"{network.sample_size}: set data.resolution {base.sample_size}"
        )
    if isinstance(data, LatentDataset):
        made_by = read_cache(folder_of(config.data))["vae"]["sha256"]
        if made_by != weights_sha256(base.vae):
            raise UserError(
                f"the latents of {config.data.source} are not of the VAE of {config.init_from}: "
                f"encode the pictures with --vae {config.init_from}"
            )
        data = copy.copy(data)
        data.mean, data.std = (
            torch.as_tensor(value, dtype=torch.float32).flatten().expand(data.channels)
            for value in base._latent_scale(torch.zeros(()))
        )
    return data


def _use_labels_of(
    base: ComplexityDiTPipeline, data: TrainingData, shared: dict[str, str]
) -> TrainingData:
    """The data with the fields and ids of the base, then new names, `shared` by all pictures."""
    for field in (*data.label_names, *shared):
        if field not in base.id2label:
            raise UserError(
                f"the base has no label field {field!r}, only "
                f"{', '.join(base.id2label) or 'none'}: an adapter adds names, not fields; "
                "choose with --data.label_fields"
            )
    if both := sorted(set(shared) & set(data.label_names)):
        raise UserError(
            f"{both[0]} is given for all pictures by lora.labels and for each by the data: leave "
            "one out (--data.label_fields)"
        )
    label_names, columns = base.label_names, []
    for field, known in label_names.items():
        ids = torch.full((len(data),), -1)
        names: Sequence[str] = []
        if field in shared:
            names, ids = [shared[field]], torch.zeros_like(ids)
        elif field in data.label_names:
            names = data.label_names[field]
            ids = data.labels[:, list(data.label_names).index(field)]
        known += [name for name in names if name not in known]
        columns.append(torch.tensor([*(known.index(name) for name in names), -1])[ids])
    data = copy.copy(data)
    data.label_names = label_names
    data.labels = torch.stack(columns, dim=1) if columns else data.labels
    return data
