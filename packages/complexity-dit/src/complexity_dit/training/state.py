"""TrainState: everything that a run needs to go on, and checkpoints that are whole or absent.

A checkpoint folder holds

    pipeline/               the EMA weights as a pipeline folder, ready to sample from; or, of an
                            adapter, adapter/, and ema.safetensors with exactly its parameters
    model.safetensors       the raw weights, of an adapter those alone
    optimizer.safetensors   the optimizer's moments
    state.json              step, EMA and schedule counters, recent gradient norms, the run's config
                            and process count
    SHA256SUMS              of all of these; compared before a run goes on from them

There is no generator state and no data position to save: both are functions of (seed, step), see
`seeding`. Folders are written aside, flushed to disk and renamed, so a final name is always whole.
Weights and moments are stored whole, also when the processes of a run hold a shard each, so that
any number of processes can go on from them.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import Accelerator
from diffusers import ModelMixin, SchedulerMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from complexity_dit.config import ADAPTER_FILE, DATA_FILE, TrainConfig
from complexity_dit.data.latents import LatentSpace
from complexity_dit.distributed import Processes
from complexity_dit.models.adapters import blank_copy
from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel
from complexity_dit.pipelines.model_card import write_card
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.training.optimizer import SpikeGuard, build_guard, build_optimizer
from inl_core.run.checkpoints import folder_of_step, latest_checkpoint, write_sums
from inl_core.run.errors import UserError
from inl_core.run.files import atomic_folder
from inl_core.run.json_files import fits, read_json_object

# Tensors that are sharded over the processes of a run (FSDP2), and whole ones to save or load.


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor; of a sharded one all processes gather it, in the same order of calls."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, equal in all processes, sharded as `like` is (or whole, if that is whole)."""
    if not isinstance(like, DTensor):
        return tensor
    # src_data_rank=None: every process has the data, so none is sent.
    return distribute_tensor(
        tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


# Which weights fit which network: to go on from a checkpoint, or to start from a pipeline.

MEANING = (
    "num_attention_heads", "num_key_value_heads", "norm_eps", "rope_theta", "network_output",
    "routing", "routing_edges",
    "dynamics_placement", "dynamics_adaptive", "dynamics_dt", "dynamics_beta_max",
    "dynamics_velocity_max", "dynamics_mu_min", "dynamics_mu_max", "dynamics_velocity_norm",
)  # fmt: skip
"""Fields of the network's config that say what its weights mean without changing their shapes."""


def check_meaning(saved: Mapping[str, Any], own: Mapping[str, Any], source: str) -> None:
    """Refuse weights of another network whose shapes happen to fit.

    Args:
        saved: The config that the weights were trained with.
        own: The config of the network that is to have them.
        source: What they come from, for the message.

    Raises:
        UserError: Naming the fields that differ.
    """
    differing = [
        f"{name} is {saved[name]!r} there and {own[name]!r} here"
        for name in MEANING
        if name in saved and name in own and saved[name] != own[name]
    ]
    if differing:
        raise UserError(
            f"{source} is of another model: {'; '.join(differing)}; use the config it was trained "
            "with"
        )


def check_labels(
    saved: Mapping[str, Sequence[str]], now: Mapping[str, Sequence[str]], checkpoint: Path
) -> None:
    """Refuse to go on with data whose labels are not those of the checkpoint, in their order.

    Args:
        saved: Names by field, in id order, that the checkpoint was trained with.
        now: Those of the data.
        checkpoint: For the message.

    Raises:
        UserError: Naming what was added and removed, and how to start from the old weights.
    """
    if {field: list(names) for field, names in saved.items()} == {
        field: list(names) for field, names in now.items()
    }:
        return
    changes = [f"label field {field} was added" for field in now if field not in saved]
    changes += [f"label field {field} was removed" for field in saved if field not in now]
    for field in (field for field in saved if field in now):
        added = [name for name in now[field] if name not in saved[field]]
        removed = [name for name in saved[field] if name not in now[field]]
        if added:
            changes.append(f"{field} has new names: {_few(added)}")
        if removed:
            changes.append(f"{field} lacks {_few(removed)}")
    raise UserError(
        f"the data's labels are not those that {checkpoint} was trained with: "
        f"{'; '.join(changes) or 'they are in another order'}. To train on with these labels, "
        f"start a new run from its weights: --init_from {checkpoint / 'pipeline'} --out NEW_FOLDER"
    )


def _few(names: Sequence[str], shown: int = 5) -> str:
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")


# What a run saves beside its network: a pipeline folder, or for an adapter an adapter folder.

_AVERAGE = "ema.safetensors"


@dataclass
class SavedPipeline:
    """What a saved pipeline has beside its network.

    Attributes:
        scheduler: Samples from a model trained on the run's objective.
        id2label: Names of the labels, `{field: {id: name}}`.
        data: The `DataConfig` as a dict: an evaluation must hold out the same pictures. For latents
            that is the data they were made from.
        latent_space: What the pipeline decodes with; None for pixels.
    """

    folder_name: ClassVar[str] = "pipeline"

    scheduler: SchedulerMixin
    id2label: dict[str, dict[int, str]]
    data: dict[str, Any]
    latent_space: LatentSpace | None = None

    def around(self, network: ModelMixin) -> ComplexityDiTPipeline:
        """A pipeline with this network."""
        decoder = {}
        if (space := self.latent_space) is not None:
            decoder = {"vae": space.vae, "latents_mean": space.mean, "latents_std": space.std}
        return ComplexityDiTPipeline(network, self.scheduler, id2label=self.id2label, **decoder)

    def save(self, network: ModelMixin, folder: Path) -> None:
        """Write a pipeline folder with `data.json` in it."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DATA_FILE).write_text(json.dumps(self.data, indent=2) + "\n")
        self.around(network).save_pretrained(folder)  # whose card reads the data

    def save_ema(self, network: ModelMixin, checkpoint: Path) -> None:
        """Write the averaged weights of a checkpoint, ready to sample from."""
        self.save(network, checkpoint / self.folder_name)

    def load_ema(
        self, checkpoint: Path, label_names: Mapping[str, Sequence[str]], config: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Averaged weights by the network's own names.

        Args:
            checkpoint: Its folder.
            label_names: Of the data, in id order.
            config: Of the network that is to have them.

        Raises:
            UserError: If the data's labels are others, or it is another network.
            OSError: If a file cannot be read; likewise ValueError, KeyError and safetensors' error.
        """
        pipeline = checkpoint / self.folder_name
        shadow = load_file(pipeline / "transformer" / "diffusion_pytorch_model.safetensors")
        network = json.loads((pipeline / "transformer" / "config.json").read_text())
        id2label = json.loads((pipeline / "model_index.json").read_text())["id2label"]
        # JSON made the ids text and sorted the fields.
        fields = {f: id2label[f] for f in network["label_fields"]}
        names = {f: [known[str(i)] for i in range(len(known))] for f, known in fields.items()}
        check_labels(names, label_names, checkpoint)
        check_meaning(network, config, f"{checkpoint}")
        return shadow


@dataclass
class AdapterParts(SavedPipeline):
    """What a saved adapter has beside its matrices.

    Attributes:
        base: Folder or Hub id of the pipeline that it was trained on.
        base_sha256: Of that pipeline's transformer.
    """

    folder_name: ClassVar[str] = "adapter"

    base: str = ""
    base_sha256: str = ""

    def save(self, network: ModelMixin, folder: Path) -> None:
        """Write an adapter folder: diffusers' file, `adapter.json`, `data.json`, a card."""
        ComplexityDiTPipeline.save_lora_weights(
            folder, network.adapter_state_dict(), network.adapter_settings()
        )
        local = Path(self.base).is_dir()
        about = {
            # Relative: a folder of runs can be moved as a whole.
            "base": os.path.relpath(self.base, folder) if local else self.base,
            "base_sha256": self.base_sha256,
            "labels": network.added_labels,
        }
        (folder / ADAPTER_FILE).write_text(json.dumps(about, indent=2) + "\n")
        (folder / DATA_FILE).write_text(json.dumps(self.data, indent=2) + "\n")
        write_card(folder)

    def save_ema(self, network: ModelMixin, checkpoint: Path) -> None:
        """As for a pipeline, and the averaged parameters by name, for an exact resume."""
        super().save_ema(network, checkpoint)
        trained = {n: p.detach() for n, p in network.named_parameters() if p.requires_grad}
        save_file({n: p.contiguous() for n, p in trained.items()}, checkpoint / _AVERAGE)

    def load_ema(
        self, checkpoint: Path, label_names: Mapping[str, Sequence[str]], config: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        about = json.loads((checkpoint / self.folder_name / ADAPTER_FILE).read_text())
        if about["base_sha256"] != self.base_sha256:
            raise UserError(
                f"{checkpoint} is of an adapter of another network than {self.base}: give the "
                "--init_from it was begun with"
            )
        added = {
            field: names
            for field in label_names
            if (names := list(label_names[field])[len(self.id2label[field]) :])
        }
        if about["labels"] != added:
            raise UserError(
                f"{checkpoint} brings the labels {about['labels']} and this run {added or 'none'}: "
                "give the data and --lora.labels it was begun with, or another --out"
            )
        return load_file(checkpoint / _AVERAGE)


STATE_FILE = "state.json"


@dataclass
class TrainState:
    """What training updates.

    Attributes:
        model: The unwrapped raw model; its parameters may be shards (FSDP2).
        ema: Its exponential moving average, placed and sharded as the model is.
        optimizer: The optimizer (accelerate's wrapper or plain).
        lr_scheduler: The learning-rate schedule.
        guard: The spike guard, if there is one.
        step: Optimizer steps done.
    """

    model: ComplexityDiTTransformer2DModel
    ema: EMAModel
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    guard: SpikeGuard | None = None
    step: int = 0

    def reset_ema(self) -> None:
        """Start the average at the weights, placed and sharded as they are now."""
        self.ema.shadow_params = [p.detach().clone() for p in self.trained()]

    def trained(self) -> list[nn.Parameter]:
        """What training moves: all parameters, or those of an adapter."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @torch.no_grad()
    def network(self, weights: Literal["raw", "ema"]) -> ComplexityDiTTransformer2DModel:
        """A whole copy on the CPU; the model in training is not touched. All processes call it."""
        copy, averaged = blank_copy(self.model), iter(self.ema.shadow_params)
        for parameter, own in zip(copy.parameters(), self.model.parameters(), strict=True):
            is_averaged = weights == "ema" and own.requires_grad
            parameter.copy_(whole(next(averaged) if is_averaged else own))
        return copy.eval()

    def save(
        self, checkpoints: Path, parts: SavedPipeline, config: dict[str, Any], processes: Processes
    ) -> Path:
        """Write `checkpoints/step-XXXXXXXX`. All processes call it, the main one writes.

        Raises:
            UserError: If the disk refuses; nothing half-written stays, older checkpoints are whole.
        """
        average, weights = self.network("ema"), _named(self.model)
        moments, groups = _flatten_optimizer(self.optimizer.state_dict())
        ema = self.ema.state_dict()
        ema.pop("shadow_params")
        meta = {
            "step": self.step,
            "processes": processes.count,
            "ema": ema,
            "optimizer_groups": groups,
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "guard": self.guard and self.guard.state_dict(),
            "config": config,
        }
        target = folder_of_step(checkpoints, self.step)

        def write() -> None:
            try:
                with atomic_folder(target) as folder:
                    parts.save_ema(average, folder)
                    save_file(weights, folder / "model.safetensors")
                    save_file(moments, folder / "optimizer.safetensors")
                    (folder / STATE_FILE).write_text(json.dumps(meta, indent=1) + "\n")
                    write_sums(folder)
            except Exception as error:  # safetensors reports a full disk as its own error type
                kept = latest_checkpoint(checkpoints)
                raise UserError(
                    f"could not write {target}: {error}; the last good checkpoint is "
                    f"{kept or 'none'}: free space (or choose another --out) and go on with "
                    "--resume auto"
                ) from error

        processes.on_main(write)
        return target

    def load(
        self, checkpoint: Path, parts: SavedPipeline, label_names: Mapping[str, Sequence[str]]
    ) -> dict[str, Any]:
        """Continue exactly where `checkpoint` was written, with any number of processes.

        Args:
            checkpoint: Its folder.
            parts: Of this run; they know how the averaged weights were written.
            label_names: Of the data, in id order.

        Returns:
            What `state.json` says of it: step, processes, config, ...

        Raises:
            UserError: If a file is missing or unreadable, the data's labels are others, or the
                checkpoint is another model's.
        """
        try:
            meta = read_json_object(checkpoint / STATE_FILE)
            weights = load_file(checkpoint / "model.safetensors")
            moments = load_file(checkpoint / "optimizer.safetensors")
            shadow = parts.load_ema(checkpoint, label_names, self.model.config)
        except UserError:
            raise
        except (
            Exception
        ) as error:  # OSError, JSONDecodeError, SafetensorError: all mean "unreadable"
            raise UserError(f"cannot read checkpoint {checkpoint}: {error}") from error
        try:
            self._restore(meta, weights, moments, shadow, checkpoint)
        except UserError:
            raise
        # What is missing or of another type in state.json shows wherever it is first used.
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise UserError(
                f"{checkpoint} is damaged, or not of this version: state.json and the optimizer's "
                f"state do not fit ({type(error).__name__}: {error})"
            ) from error
        return meta

    def _restore(
        self,
        meta: dict[str, Any],
        weights: dict[str, Tensor],
        moments: dict[str, Tensor],
        shadow: dict[str, Tensor],
        checkpoint: Path,
    ) -> None:
        if (
            not fits(meta["step"], int)
            or meta["step"] < 0
            or not fits(meta["config"], dict[str, Any])
        ):
            raise ValueError(f"step {meta['step']!r}")
        _load_weights(self.model, weights, checkpoint)
        self.ema.load_state_dict(meta["ema"])
        names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        for name, parameter in zip(names, self.ema.shadow_params, strict=True):
            parameter.copy_(shard_like(shadow[name], parameter))
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        saved = _unflatten_optimizer(moments, meta["optimizer_groups"], parameters)
        self._load_optimizer(saved, checkpoint)
        self.lr_scheduler.load_state_dict(meta["lr_scheduler"])
        if self.guard is not None and meta.get("guard"):
            self.guard.load_state_dict(meta["guard"])
        self.step = meta["step"]

    def _load_optimizer(self, saved: dict[str, Any], checkpoint: Path) -> None:
        try:
            self.optimizer.load_state_dict(saved)
        except ValueError as error:  # other groups, or groups of other sizes
            raise UserError(
                f"{checkpoint} was written by another optimizer ({error}): go on with the "
                "--optim.name it was trained with, or start anew in another --out"
            ) from error


def _named(model: nn.Module) -> dict[str, Tensor]:
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return {name: whole(p.detach()).contiguous() for name, p in trained}


def _load_weights(model: nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    """Load weights of exactly this model, or say which tensors differ."""
    own = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    missing, extra = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
    shapes = [
        f"{name} is {tuple(weights[name].shape)} there and {tuple(own[name])} here"
        for name in own
        if name in weights and weights[name].shape != own[name]
    ]
    if missing or extra or shapes:
        differences = (
            shapes + [f"{n} is missing" for n in missing] + [f"{n} is unknown" for n in extra]
        )
        raise UserError(
            f"{source} is a checkpoint of another model ({len(differences)} tensors differ): "
            f"{'; '.join(differences[:3])}; use the config it was trained with, or another --out"
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(shard_like(weights[name], parameter))


def _flatten_optimizer(state: dict[str, Any]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """An optimizer's state as named tensors and JSON, so that no pickle is needed."""
    tensors = {
        f"{index}.{name}": whole(value).contiguous()
        for index, entries in state["state"].items()
        for name, value in entries.items()
    }
    return tensors, state["param_groups"]


def _unflatten_optimizer(
    tensors: dict[str, Tensor], groups: list[dict], parameters: list[Tensor]
) -> dict[str, Any]:
    """The inverse, each entry of a parameter's shape sharded as the parameter is."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        if value.shape == parameter.shape:
            value = shard_like(value, parameter)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": groups}


def build_state(model: ComplexityDiTTransformer2DModel, config: TrainConfig) -> TrainState:
    """Optimizer, schedule, EMA and spike guard round a model."""
    optim = config.optim
    optimizer = build_optimizer(model, optim)
    lr_scheduler = get_scheduler(
        optim.schedule,
        optimizer,
        num_warmup_steps=optim.warmup_steps,
        num_training_steps=config.steps,
    )
    ema = EMAModel(
        [p for p in model.parameters() if p.requires_grad],
        decay=config.ema.decay,
        use_ema_warmup=True,
        power=config.ema.power,
        foreach=True,
    )
    guard = build_guard(optim, config.mixed_precision)
    return TrainState(model, ema, optimizer, lr_scheduler, guard)


def prepared_state(
    network: ComplexityDiTTransformer2DModel, config: TrainConfig, accelerator: Accelerator
) -> tuple[TrainState, nn.Module]:
    """`build_state` on the run's device and processes, and the model to call in a step.

    The order matters: blocks are compiled before sharding hooks into them, and the average is laid
    beside the parameters as they are after that.
    """
    state = build_state(network, config)
    if config.compile == "regional":
        network.compile_repeated_blocks(fullgraph=True)
    model, state.optimizer = accelerator.prepare(state.model, state.optimizer)
    state.reset_ema()
    return state, model
