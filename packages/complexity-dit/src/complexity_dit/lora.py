"""Training an adapter: the network of a pipeline, frozen, with PEFT's matrices and new labels."""

import copy
import logging
from collections.abc import Sequence
from dataclasses import asdict

import torch

from complexity_dit.config import LoraOptions, TrainConfig
from complexity_dit.hashing import weights_sha256
from complexity_dit.latents import (
    LatentDataset,
    LatentSpace,
    TrainingData,
    folder_of,
    read_cache,
    source_config,
)
from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel
from complexity_dit.parts import AdapterParts
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.pipelines.sampling import load_pipeline
from complexity_dit.pipelines.schedulers import is_flow
from inl_core.run.errors import UserError

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
