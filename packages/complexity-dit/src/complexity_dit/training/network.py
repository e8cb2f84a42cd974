"""From a config and its data to the network and its training state."""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from complexity_dit.config import LoraOptions, ModelConfig, TrainConfig
from complexity_dit.data.latents import (
    LatentDataset,
    LatentSpace,
    TrainingData,
    folder_of,
    read_cache,
    source_config,
)
from complexity_dit.hashing import weights_sha256
from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel, middle_blocks
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.pipelines.sampling import load_pipeline
from complexity_dit.pipelines.schedulers import is_flow
from complexity_dit.training.objective import time_quantiles
from complexity_dit.training.state import AdapterParts, check_meaning
from inl_core.run.errors import UserError

# Training an adapter: the network of a pipeline, frozen, with PEFT's matrices and new labels.

logger = logging.getLogger(__name__)


def adapt(
    config: TrainConfig, data: TrainingData
) -> tuple[ComplexityDiTTransformer2DModel, AdapterParts, TrainingData]:
    """The base's network with an adapter to train, what is saved with it, and the data in its ids.

    Args:
        config: The run; its `model` settings are not read, the base has its own.
        data: The pictures. Labels that the base knows keep its ids; others become the adapter's.

    Raises:
        UserError: If PEFT is absent, there is no base, or data, objective and base do not fit.
    """
    options = config.lora
    _check(options, config)
    base = load_pipeline(str(config.init_from))
    if base.transformer.added_labels:
        raise UserError(f"--init_from {config.init_from} is an adapter: give a whole pipeline")
    _check_objective(config, base)
    data = _in_the_space_of(base, data, config)
    data = _labelled_by(base, data, options.labels)
    pictures, space = asdict(source_config(config.data)), None
    if base.vae is not None:
        space = LatentSpace(base.vae, base.config.latents_mean, base.config.latents_std, pictures)
    parts = AdapterParts(
        base.scheduler, base.id2label, pictures, space,
        base=str(config.init_from), base_sha256=weights_sha256(base.transformer),
    )  # fmt: skip
    return _with_adapter(base, data, options, config.seed), parts, data


def _with_adapter(
    base: ComplexityDiTPipeline, data: TrainingData, options: LoraOptions, seed: int
) -> ComplexityDiTTransformer2DModel:
    from peft import LoraConfig

    network = base.transformer.train()
    rank = options.rank
    torch.manual_seed(seed)
    settings = LoraConfig(
        r=rank,
        lora_alpha=rank if options.alpha is None else options.alpha,  # pyright: ignore
        lora_dropout=options.dropout,
        target_modules=list(options.targets),
    )
    try:
        network.add_adapter(settings)
    except ValueError as error:  # no layer has such a name
        raise UserError(f"lora.targets {options.targets}: {error}") from error
    new = {
        field: names[len(base.id2label[field]) :]
        for field, names in data.label_names.items()
        if len(names) > len(base.id2label[field])
    }
    network.add_labels(new)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    logger.info(
        "an adapter of rank %d for %s: %d numbers to train; new labels: %s",
        rank, " ".join(options.targets), trained,
        "; ".join(f"{field} {', '.join(names)}" for field, names in new.items()) or "none",
    )  # fmt: skip
    return network


def _check(options: LoraOptions, config: TrainConfig) -> None:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UserError("adapters need PEFT: pip install 'complexity-dit[lora]'") from error
    if config.init_from is None:
        raise UserError(
            f"lora.rank {options.rank} trains an adapter of a pipeline: say which, --init_from"
        )
    if not 0 <= options.dropout < 1:
        raise UserError(f"lora.dropout {options.dropout} must be at least 0 and below 1")
    if not options.targets:
        raise UserError("lora.targets is empty: name layers, e.g. [to_q, to_k, to_v, to_out.0]")
    if config.model.token_drop_rate:
        raise UserError("an adapter is trained on whole pictures: leave model.token_drop_rate at 0")


def _check_objective(config: TrainConfig, base: ComplexityDiTPipeline) -> None:
    scheduler, objective = base.scheduler, config.objective
    kind = "flow" if is_flow(scheduler) else scheduler.config.prediction_type
    output = "sample" if objective.writes_sample else "target"
    for name, ours, theirs in (
        ("prediction_type", objective.prediction_type, kind),
        ("network_output", output, base.transformer.config.network_output),
    ):
        if ours != theirs:
            raise UserError(
                f"the objective's {name} is {ours}, and {config.init_from} was trained with "
                f"{theirs}: set --objective.{name} {theirs}"
            )


def _in_the_space_of(
    base: ComplexityDiTPipeline, data: TrainingData, config: TrainConfig
) -> TrainingData:
    """The data as the base's network sees pictures: its size, its VAE, its latents' scale."""
    network = base.transformer.config
    if isinstance(data, LatentDataset) != (base.vae is not None):
        wants = "latents, which `encode` makes" if base.vae is not None else "pictures themselves"
        raise UserError(f"{config.init_from} is trained on {wants}: set data.source accordingly")
    if (data.channels, data.sample_size) != (network.in_channels, network.sample_size):
        raise UserError(
            f"the data are {data.channels} channels of {data.sample_size} x {data.sample_size}, "
            f"and {config.init_from} paints {network.in_channels} of {network.sample_size} x "
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
        mean, std = base._latent_scale(torch.zeros(()))
        data.mean, data.std = (
            torch.as_tensor(x, dtype=torch.float32).flatten().expand(data.channels)
            for x in (mean, std)
        )
    return data


def _labelled_by(
    base: ComplexityDiTPipeline, data: TrainingData, for_all: dict[str, str]
) -> TrainingData:
    """The data with the base's fields and ids; what it does not know follows its names."""
    for field in (*data.label_names, *for_all):
        if field not in base.id2label:
            raise UserError(
                f"the base has no label field {field!r}, only "
                f"{', '.join(base.id2label) or 'none'}: an adapter brings names, not fields; "
                "choose with --data.label_fields"
            )
    if both := sorted(set(for_all) & set(data.label_names)):
        raise UserError(
            f"{both[0]} is given for all pictures by lora.labels and for each by the data: leave "
            "one out (--data.label_fields)"
        )
    names, columns = base.label_names, []
    for field, known in names.items():
        found, ids = _column(data, field, for_all)
        known += [name for name in found if name not in known]
        to_base = torch.tensor([*(known.index(name) for name in found), -1])
        columns.append(to_base[ids])
    data = copy.copy(data)
    data.label_names = names
    data.labels = torch.stack(columns, dim=1) if columns else data.labels
    return data


def _column(
    data: TrainingData, field: str, for_all: dict[str, str]
) -> tuple[Sequence[str], torch.Tensor]:
    """A field's names in the data, and an id of them for each picture."""
    count = len(data)
    if field in for_all:
        return [for_all[field]], torch.zeros(count, dtype=torch.int64)
    if field not in data.label_names:
        return [], torch.full((count,), -1)
    return data.label_names[field], data.labels[:, list(data.label_names).index(field)]


def start_from(
    model: ComplexityDiTTransformer2DModel,
    pipeline: str,
    label_names: Mapping[str, Sequence[str]],
) -> None:
    """Give a new model the weights of a trained one.

    Labels are matched by field and name. A label that the pipeline does not know starts from its
    field's null row, and a new field from zeros, so that the model begins by painting such a
    picture as it painted one without that label. A field that the data lack is "not given" from now
    on: its null row moves into the bias that it was always added to.

    Args:
        model: The new model, changed in place.
        pipeline: Pipeline folder or Hub id.
        label_names: Of the data, in id order: the rows of the new model's label tables.

    Raises:
        UserError: If there is no such pipeline, or its network is another one than the model but
            for labels and size of the picture.
    """
    source = load_pipeline(pipeline)
    check_meaning(source.transformer.config, model.config, f"--init_from {pipeline}")
    old = dict(source.transformer.named_parameters())
    tables = {name for name in (*old, *dict(model.named_parameters())) if "label_embed." in name}
    own = {name: p for name, p in model.named_parameters() if name not in tables}
    differences = [f"{name} is missing" for name in own if name not in old]
    differences += [f"{name} is unknown" for name in old if name not in own and name not in tables]
    differences += [
        f"{name} is {tuple(old[name].shape)} there and {tuple(p.shape)} here"
        for name, p in own.items()
        if name in old and old[name].shape != p.shape
    ]
    if differences:
        raise UserError(
            f"--init_from {pipeline} is of another model ({len(differences)} tensors differ): "
            f"{'; '.join(differences[:3])}; use the model settings it was trained with"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(old[name])
        for field, names in label_names.items():
            model.label_embed[field].weight.copy_(_table(source, field, names))
        for field in source.label_names:
            if field not in label_names:
                model.time_embed.linear_2.bias += _rows(source, field)[-1]
    logger.info("started from the weights of %s", pipeline)


def _rows(source: ComplexityDiTPipeline, field: str) -> Tensor:
    return source.transformer.label_embed[field].weight.detach()


def _table(source: ComplexityDiTPipeline, field: str, names: Sequence[str]) -> Tensor:
    """Rows of a field's new table: known labels, others, and the null row at the end."""
    if field not in source.label_names:
        logger.info("label field %s is new: all of its %d names start at zero", field, len(names))
        return torch.zeros(len(names) + 1, source.transformer.config.hidden_size)
    rows, known = _rows(source, field), source.label_names[field]
    new = [name for name in names if name not in known]
    if new:
        logger.info("new %s names start from the null row: %s", field, ", ".join(new))
    null = len(known)
    chosen = [known.index(name) if name in known else null for name in names]
    return rows[[*chosen, null]]


def build_model(config: TrainConfig, data: TrainingData) -> ComplexityDiTTransformer2DModel:
    """The network of a config, with one label table for each field of the data."""
    config.objective.check()
    settings = {
        "sample_size": data.sample_size,
        "patch_size": config.model.patch_size,
        "in_channels": data.channels,
        "label_fields": list(data.label_names),
        "num_classes": [len(names) for names in data.label_names.values()],
        "dynamics_placement": config.model.dynamics_placement,
        "dynamics_adaptive": config.model.dynamics_adaptive,
        "network_output": "sample" if config.objective.writes_sample else "target",
        "token_drop_start": config.model.token_drop_start,
        "token_drop_end": config.model.token_drop_end,
        "value_residual": config.model.value_residual,
        "routing": config.model.routing,
        "num_experts": config.model.num_experts,
    }
    if config.model.routing == "timestep" and config.model.num_experts > 1:
        settings["routing_edges"] = time_quantiles(config.model.num_experts, config.objective)
    try:
        model = ComplexityDiTTransformer2DModel.from_size(
            config.model.size, **(settings | config.model.overrides)
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"this model cannot be built: {error}") from error
    _check_token_drop(config.model, model)
    return model


def _check_token_drop(config: ModelConfig, model: ComplexityDiTTransformer2DModel) -> None:
    rate = config.token_drop_rate
    if not 0 < config.token_drop_until <= 1:
        raise UserError(
            f"token_drop_until {config.token_drop_until} must be above 0 and at most 1: the share "
            "of the run with dropping (token_drop_rate 0 switches it off)"
        )
    if not 0 <= rate < 1:
        raise UserError(f"token_drop_rate {rate} must be at least 0 (off) and below 1")
    start, end = middle_blocks(model.config)
    if rate and start >= end:
        raise UserError(
            f"token_drop_rate {rate}: a network of {model.config.num_layers} blocks has no middle "
            "ones to bypass; use 3 or more, or set token_drop_start and token_drop_end"
        )
