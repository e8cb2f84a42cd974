"""`TrainState`, all that a run needs to resume, and its checkpoints.

A checkpoint folder holds

    pipeline/               the EMA weights as a pipeline folder that can be sampled from; for an
                            adapter: adapter/, and ema.safetensors with its parameters by name
    averages.safetensors    power-function averages, if the run keeps any (see `averages`)
    model.safetensors       the raw weights, for an adapter only its own
    optimizer.safetensors   the moments of the optimizer
    state.json              step, EMA counter, fp16's loss scale, recent gradient norms, process
                            count; settings with the history of their changes, and which data
    SHA256SUMS              of all these files; verified before a run resumes

Generator states and data positions are not saved: both are functions of (seed, step), see
`seeding`. A folder is written under another name, flushed to disk and renamed, so a checkpoint is
complete or absent. Weights and moments are saved unsharded, so that any number of processes can
resume from them.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from accelerate import Accelerator
from diffusers import ModelMixin, SchedulerMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from complexity_dit.config import ADAPTER_FILE, DATA_FILE, RunConfig, TrainConfig
from complexity_dit.data.clusters import save_clusters
from complexity_dit.data.latents import LatentSpace
from complexity_dit.distributed import on_main, process_state
from complexity_dit.models.adapters import blank_copy
from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel
from complexity_dit.pipelines.model_card import write_card
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.training.averages import AVERAGES_FILE, PowerEMA, tensor_name
from complexity_dit.training.compilation import compile_network
from complexity_dit.training.optimizer import SpikeGuard, build_optimizer
from complexity_dit.training.text import PromptedNetwork
from inl_core import defer_bounds
from inl_core.run.checkpoints import folder_of_step, latest_checkpoint, write_sums
from inl_core.run.errors import UserError
from inl_core.run.files import atomic_folder
from inl_core.run.json_files import fits, read_json_object
from inl_core.run.ownership import keeping_settings, move_schedule

# Sharded tensors (FSDP2).


def full_tensor(tensor: Tensor) -> Tensor:
    """The unsharded tensor. All processes gather a shard together, in the same order of calls."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A full tensor, equal in all processes, sharded as `like` is (or not, if `like` is not)."""
    if not isinstance(like, DTensor):
        return tensor
    # src_data_rank=None: every process has the data, so none is sent.
    return distribute_tensor(
        tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


# Compatibility of weights with a network, to resume from a checkpoint or start from a pipeline.

MEANING = (
    "num_attention_heads", "num_key_value_heads", "norm_eps", "rope_theta", "network_output",
    "auxiliary_layer",
    "dynamics_placement", "dynamics_adaptive", "dynamics_dt", "dynamics_beta_max",
    "dynamics_velocity_max", "dynamics_mu_min", "dynamics_mu_max", "dynamics_velocity_norm",
)  # fmt: skip
"""Config fields of the network that change what its weights compute but not their shapes."""


def check_meaning(saved: Mapping[str, Any], current: Mapping[str, Any], source: str) -> None:
    """Refuse weights trained with another config whose shapes happen to fit."""
    differing = [
        f"{name} is {saved[name]!r} there and {current[name]!r} here"
        for name in MEANING
        if name in saved and name in current and saved[name] != current[name]
    ]
    if differing:
        raise UserError(
            f"{source} is of another model: {'; '.join(differing)}; use the config it was trained "
            "with"
        )


def check_shapes(saved: Mapping[str, Tensor], current: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights whose names or shapes are not those of a network."""
    differences = [
        f"{name} is {tuple(saved[name].shape)} there and {tuple(tensor.shape)} here"
        for name, tensor in current.items()
        if name in saved and saved[name].shape != tensor.shape
    ]
    differences += [f"{name} is missing" for name in sorted(set(current) - set(saved))]
    differences += [f"{name} is unknown" for name in sorted(set(saved) - set(current))]
    if differences:
        raise UserError(
            f"{source} is of another model ({len(differences)} tensors differ): "
            f"{'; '.join(differences[:3])}; use the config it was trained with"
        )


def check_labels(
    saved: Mapping[str, list[str]], current: Mapping[str, list[str]], checkpoint: Path
) -> None:
    """Refuse data whose labels (names by field, in id order) differ from those of a checkpoint."""
    if saved == current:
        return
    changes = [f"label field {field} was added" for field in current if field not in saved]
    changes += [f"label field {field} was removed" for field in saved if field not in current]
    for field in (field for field in saved if field in current):
        for change, names, others in (
            ("has new names:", current[field], saved[field]),
            ("lacks", saved[field], current[field]),
        ):
            if differing := [name for name in names if name not in others]:
                more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
                changes.append(f"{field} {change} {', '.join(differing[:5])}{more}")
    raise UserError(
        f"the labels of the data differ from those that {checkpoint} was trained with: "
        f"{'; '.join(changes) or 'they are in another order'}. To train on with these labels, "
        f"start a new run from its weights: --init_from {checkpoint / 'pipeline'} --out NEW_FOLDER"
    )


# The result of a run: a pipeline folder, or an adapter folder.

_EMA_FILE = "ema.safetensors"


class SavedResult(Protocol):
    """What a checkpoint holds of the result of a run, and how it is read to resume."""

    folder_name: ClassVar[str]

    def save_ema(self, network: Any, checkpoint: Path) -> None:
        """Write the averaged weights into a checkpoint, ready to use."""
        ...

    def load_ema(
        self, checkpoint: Path, label_names: Mapping[str, list[str]], config: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Read averaged weights by name, for a network of this config and data of these labels."""
        ...


@dataclass
class SavedPipeline:
    """The parts of a saved pipeline other than its network.

    `data` is the `DataConfig` as a dict, for latents that of the pictures they were made from, so
    that an evaluation holds out the same pictures. The latent space is None for pixels;
    `label_counts` is for `LabelTable`, and `centres` are those of clusters. A text encoder that is
    trained along comes with the network.
    """

    folder_name: ClassVar[str] = "pipeline"

    scheduler: SchedulerMixin
    id2label: dict[str, dict[int, str]]
    data: dict[str, Any]
    latent_space: LatentSpace | None = None
    label_counts: dict[str, int] | None = None
    centres: Tensor | None = None
    tokenizer: Any = None
    text_encoder: Any = None
    prompt_length: int | None = None

    def build_pipeline(self, network: ModelMixin | PromptedNetwork) -> ComplexityDiTPipeline:
        """A pipeline of this network, with the text encoder that it may bring, and these parts."""
        decoder, text_encoder = {}, self.text_encoder
        if (space := self.latent_space) is not None:
            decoder = {"vae": space.vae, "latents_mean": space.mean, "latents_std": space.std}
        if isinstance(network, PromptedNetwork):
            network, text_encoder = network.network, network.text_encoder
        return ComplexityDiTPipeline(
            network,
            self.scheduler,
            id2label=self.id2label,
            label_counts=self.label_counts,
            text_encoder=text_encoder,
            tokenizer=self.tokenizer,
            prompt_length=self.prompt_length,
            **decoder,
        )

    def save(self, network: ModelMixin | PromptedNetwork, folder: Path) -> None:
        """Write a pipeline folder with `data.json` in it."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DATA_FILE).write_text(json.dumps(self.data, indent=2) + "\n")
        if self.centres is not None:
            save_clusters(self.centres, folder)
        self.build_pipeline(network).save_pretrained(folder)  # its model card reads data.json

    def save_ema(self, network: ModelMixin | PromptedNetwork, checkpoint: Path) -> None:
        """Write the averaged weights into a checkpoint, ready to sample from."""
        self.save(network, checkpoint / self.folder_name)

    def load_ema(
        self, checkpoint: Path, label_names: Mapping[str, list[str]], config: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Read averaged weights by name, for a network of this config and data of these labels."""
        pipeline = checkpoint / self.folder_name
        shadow = load_file(pipeline / "transformer" / "diffusion_pytorch_model.safetensors")
        network = read_json_object(pipeline / "transformer" / "config.json", follow_links=False)
        index = read_json_object(pipeline / "model_index.json", follow_links=False)
        id2label = index["id2label"]
        # JSON turned the ids into strings and sorted the fields.
        names = {
            field: [id2label[field][str(i)] for i in range(len(id2label[field]))]
            for field in network["label_fields"]
        }
        check_labels(names, label_names, checkpoint)
        check_meaning(network, config, f"{checkpoint}")
        if self.tokenizer is None or self.text_encoder is not None:
            return shadow
        trained = load_file(pipeline / "text_encoder" / "model.safetensors")
        parts = {"network": shadow, "text_encoder": trained}
        return {
            f"{part}.{n}": value for part, tensors in parts.items() for n, value in tensors.items()
        }


@dataclass
class SavedAdapter(SavedPipeline):
    """The parts of a saved adapter other than its matrices.

    `base` is the folder or Hub id of its pipeline, and the digest is of that one's transformer.
    """

    folder_name: ClassVar[str] = "adapter"

    base: str = ""
    base_sha256: str = ""

    def save(self, network: ModelMixin, folder: Path) -> None:
        """Write an adapter folder: the file of diffusers, `adapter.json`, `data.json`, a card."""
        ComplexityDiTPipeline.save_lora_weights(
            folder, network.adapter_state_dict(), network.adapter_settings()
        )
        # Relative, so that base and adapter can be moved together.
        base = os.path.relpath(self.base, folder) if Path(self.base).is_dir() else self.base
        labels = network.added_labels
        about = {"base": base, "base_sha256": self.base_sha256, "labels": labels}
        (folder / ADAPTER_FILE).write_text(json.dumps(about, indent=2) + "\n")
        (folder / DATA_FILE).write_text(json.dumps(self.data, indent=2) + "\n")
        write_card(folder)

    def save_ema(self, network: ModelMixin, checkpoint: Path) -> None:
        """As for a pipeline, and the averaged parameters by name, for an exact resume."""
        super().save_ema(network, checkpoint)
        save_file(full_tensors(network), checkpoint / _EMA_FILE)

    def load_ema(
        self, checkpoint: Path, label_names: Mapping[str, list[str]], config: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        path = checkpoint / self.folder_name / ADAPTER_FILE
        about = read_json_object(path, follow_links=False)
        if about["base_sha256"] != self.base_sha256:
            raise UserError(
                f"{checkpoint} is an adapter of another network than {self.base}: give the "
                "--init_from that its run was started with"
            )
        added = {
            field: names
            for field in label_names
            if (names := label_names[field][len(self.id2label[field]) :])
        }
        if about["labels"] != added:
            raise UserError(
                f"{checkpoint} adds the labels {about['labels']} and this run {added or 'none'}: "
                "give the data and --lora.labels that it was started with, or another --out"
            )
        return load_file(checkpoint / _EMA_FILE)


# The state of a run.

STATE_FILE = "state.json"


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters of a network by name, or those of its adapter."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def full_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What is trained, unsharded. All processes call it together."""
    return {name: full_tensor(p.detach()).contiguous() for name, p in trainable(model).items()}


@dataclass
class TrainState:
    """All that training updates.

    The model is the unwrapped one, whose parameters may be shards (FSDP2); `ema` averages those
    that are trained, placed and sharded alike.
    """

    model: Any  # a ModelMixin with ConfigMixin, or a PromptedNetwork of one
    ema: EMAModel
    averages: dict[float, PowerEMA]  # by length
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    guard: SpikeGuard | None = None
    scaler: torch.amp.GradScaler | None = None  # of fp16
    step: int = 0
    skipped: int = 0  # steps without an update, by the guard or the scaler

    def loss_scale(self) -> float:
        """Factor of the loss in the backward pass of fp16, else 1."""
        return self.scaler.get_scale() if self.scaler is not None else 1.0

    def reset_ema(self) -> None:
        """Restart the averages at the current weights, placed and sharded as they are now."""
        for average in (self.ema, *self.averages.values()):
            average.shadow_params = [p.detach().clone() for p in trainable(self.model).values()]

    def full_averages(self) -> dict[str, Tensor]:
        """The power-function averages as the tensors of a file. All processes call it together."""
        names = trainable(self.model)
        return {
            tensor_name(length, name): full_tensor(value).contiguous()
            for length, average in self.averages.items()
            for name, value in zip(names, average.shadow_params, strict=True)
        }

    @torch.no_grad()
    def export(self, weights: Literal["raw", "ema"]) -> Any:
        """An unsharded copy of the network on the CPU. All processes call it together."""
        model = self.model
        copy = model.blank_copy() if isinstance(model, PromptedNetwork) else blank_copy(model)
        averaged = iter(self.ema.shadow_params)
        for parameter, current in zip(copy.parameters(), model.parameters(), strict=True):
            is_averaged = weights == "ema" and current.requires_grad
            parameter.copy_(full_tensor(next(averaged) if is_averaged else current))
        return copy.eval()

    def save(self, checkpoints: Path, saved: SavedResult, record: dict[str, Any]) -> Path:
        """Write `checkpoints/step-XXXXXXXX`. All processes call it, the main one writes.

        `record` is what else `state.json` holds: config, changes and data of the run.
        If the disk is full or not writable, nothing half-written stays.
        """
        averaged, weights = self.export("ema"), full_tensors(self.model)
        averages = self.full_averages()
        optimizer = self.optimizer.state_dict()
        moments = {  # named tensors and JSON, so that no pickle is needed
            f"{index}.{name}": full_tensor(value).contiguous()
            for index, entries in optimizer["state"].items()
            for name, value in entries.items()
        }
        ema = self.ema.state_dict()
        ema.pop("shadow_params")
        state = process_state()
        meta = {
            "step": self.step,
            "processes": state.num_processes if state else 1,
            "ema": ema,
            "optimizer_groups": optimizer["param_groups"],
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "guard": self.guard and self.guard.state_dict(),
            "scaler": self.scaler and self.scaler.state_dict(),
            "skipped": self.skipped,
            **record,
        }
        target = folder_of_step(checkpoints, self.step)

        def write() -> None:
            try:
                with atomic_folder(target) as folder:
                    saved.save_ema(averaged, folder)
                    if averages:
                        save_file(averages, folder / AVERAGES_FILE)
                    save_file(weights, folder / "model.safetensors")
                    save_file(moments, folder / "optimizer.safetensors")
                    (folder / STATE_FILE).write_text(json.dumps(meta, indent=1) + "\n")
                    write_sums(folder)
            except Exception as error:  # safetensors reports a full disk as its own error type
                kept = latest_checkpoint(checkpoints)
                raise UserError(
                    f"could not write {target}: {error}; the last good checkpoint is "
                    f"{kept or 'none'}: free space (or choose another --out) and resume with "
                    "--resume auto"
                ) from error

        on_main(write)
        return target

    def load(
        self, checkpoint: Path, saved: SavedResult, label_names: Mapping[str, list[str]]
    ) -> dict[str, Any]:
        """Restore what a checkpoint was written with, in any number of processes.

        The settings of optimizer, schedule and average stay those of this run. Returned are the
        contents of `state.json`: step, processes, config, and so on.
        """
        try:
            meta = read_state(checkpoint)
            weights = load_file(checkpoint / "model.safetensors")
            moments = load_file(checkpoint / "optimizer.safetensors")
            shadow = saved.load_ema(checkpoint, label_names, self.model.config)
            averages = load_file(checkpoint / AVERAGES_FILE) if self.averages else {}
            check_shapes(weights, trainable(self.model), f"{checkpoint}")
            self.ema.optimization_step = int(meta["ema"]["optimization_step"])
            with torch.no_grad():
                averaged = zip(trainable(self.model).items(), self.ema.shadow_params, strict=True)
                for (name, parameter), average in averaged:
                    parameter.copy_(shard_like(weights[name], parameter))
                    average.copy_(shard_like(shadow[name], average))
                names = list(trainable(self.model))
                for length, kept in self.averages.items():
                    kept.optimization_step = meta["step"]
                    for name, average in zip(names, kept.shadow_params, strict=True):
                        average.copy_(shard_like(averages[tensor_name(length, name)], average))
            self._load_optimizer(moments, meta["optimizer_groups"], checkpoint)
            move_schedule(self.lr_scheduler, meta["step"])
            guard = meta.get("guard") or {}
            if self.guard is not None and guard:
                self.guard.load_state_dict(guard)
            if self.scaler is not None and meta.get("scaler"):
                self.scaler.load_state_dict(meta["scaler"])
            self.skipped = int(meta.get("skipped", guard.get("skipped", 0)))
        except UserError:
            raise
        # Of any type: what is missing or of another type in a file fails where it is first used.
        except Exception as error:
            raise _unreadable(checkpoint, error) from error
        self.step = meta["step"]
        return meta

    def _load_optimizer(
        self, moments: dict[str, Tensor], groups: list[dict], checkpoint: Path
    ) -> None:
        """Set the optimizer's state; an entry of a parameter's shape is sharded alike."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in moments.items():
            index, name = key.split(".", 1)
            parameter = parameters[int(index)]
            fitting = shard_like(value, parameter) if value.shape == parameter.shape else value
            state.setdefault(int(index), {})[name] = fitting
        try:
            with keeping_settings(self.optimizer):
                self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        except ValueError as error:  # other groups, or groups of other sizes
            raise UserError(
                f"{checkpoint} was written by another optimizer ({error}): use the --optim.name "
                "it was trained with, or start a new run in another --out"
            ) from error


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The contents of `state.json`, with its step and config checked; `UserError` if unreadable."""
    try:
        meta = read_json_object(checkpoint / STATE_FILE, follow_links=False)
        step = meta["step"]
        if not fits(step, int) or step < 0 or not fits(meta["config"], dict[str, Any]):
            raise ValueError(f"step {step!r}")
    except Exception as error:
        raise _unreadable(checkpoint, error) from error
    return meta


def _unreadable(checkpoint: Path, error: Exception) -> UserError:
    return UserError(
        f"cannot read checkpoint {checkpoint} ({type(error).__name__}: {error}); it may be damaged "
        "or of another version"
    )


def build_state(
    model: ComplexityDiTTransformer2DModel | PromptedNetwork, config: TrainConfig
) -> TrainState:
    """A model with optimizer, schedule, EMA and spike guard for a run."""
    return schedule_and_average(model, build_optimizer(model, config.optim), config)


def schedule_and_average(
    model: Any, optimizer: torch.optim.Optimizer, config: RunConfig
) -> TrainState:
    """A model and its optimizer with schedule, EMA and spike guard for a run."""
    optim = config.optim
    counts = {"num_warmup_steps": optim.warmup_steps, "num_training_steps": config.steps}
    lr_scheduler = get_scheduler(optim.schedule, optimizer, **counts)
    ema = EMAModel(
        trainable(model).values(), decay=config.ema.decay, use_ema_warmup=True,
        power=config.ema.power, foreach=True,
    )  # fmt: skip
    averages = {
        length: PowerEMA(trainable(model).values(), length) for length in config.ema.kept_lengths
    }
    guard = SpikeGuard(optim) if optim.spike_factor else None
    return TrainState(model, ema, averages, optimizer, lr_scheduler, guard)


def prepared_state(
    state: TrainState, config: RunConfig, accelerator: Accelerator
) -> tuple[TrainState, nn.Module]:
    """A new state on the devices and processes of the run, and the wrapped model to call.

    The order matters: the network is compiled before accelerate wraps its forward and FSDP2 hooks
    into its blocks, and the average restarts from the parameters as they are placed after that.
    """
    whole = state.model
    network = whole.network if isinstance(whole, PromptedNetwork) else whole
    parts = getattr(config, "gradient_accumulation_steps", 1) * network.config.get("num_loops", 1)
    if parts * accelerator.num_processes > 1:
        defer_bounds(whole)  # `optimizer_step` applies them to the gradient of the whole batch
    compile_network(network, str(config.compile))
    model, state.optimizer = accelerator.prepare(whole, state.optimizer)
    state.scaler = accelerator.scaler
    state.reset_ema()
    return state, model
