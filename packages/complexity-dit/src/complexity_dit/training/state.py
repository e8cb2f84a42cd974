"""`TrainState`, all that a run needs to resume, and its checkpoints.

A checkpoint folder holds

    pipeline/               the EMA weights as a pipeline folder that can be sampled from; for an
                            adapter: adapter/, and ema.safetensors with its parameters by name
    model.safetensors       the raw weights, for an adapter only its own
    optimizer.safetensors   the moments of the optimizer
    state.json              step, EMA and schedule counters, recent gradient norms, config and
                            process count of the run
    SHA256SUMS              of all these files; verified before a run resumes

Generator states and data positions are not saved: both are functions of (seed, step), see
`seeding`. A folder is written under another name, flushed to disk and renamed, so a checkpoint is
complete or absent. Weights and moments are saved unsharded, so that any number of processes can
resume from them.
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
from complexity_dit.distributed import on_main, process_state
from complexity_dit.models.adapters import blank_copy
from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel
from complexity_dit.pipelines.model_card import write_card
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.training.optimizer import SpikeGuard, build_optimizer
from inl_core.run.checkpoints import folder_of_step, latest_checkpoint, write_sums
from inl_core.run.errors import UserError
from inl_core.run.files import atomic_folder
from inl_core.run.json_files import fits, read_json_object

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
    "routing", "routing_edges",
    "dynamics_placement", "dynamics_adaptive", "dynamics_dt", "dynamics_beta_max",
    "dynamics_velocity_max", "dynamics_mu_min", "dynamics_mu_max", "dynamics_velocity_norm",
)  # fmt: skip
"""Config fields of the network that change what its weights compute but not their shapes."""


def check_meaning(saved: Mapping[str, Any], current: Mapping[str, Any], source: str) -> None:
    """Refuse weights of another network whose shapes happen to fit.

    Args:
        saved: The config that the weights were trained with.
        current: The config of the network that is to load them.
        source: Where the weights come from, for the message.

    Raises:
        UserError: Naming the fields that differ.
    """
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


def compare_shapes(saved: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> list[str]:
    """The differences between two sets of named tensors, one text per tensor."""
    differences = [
        f"{name} is {tuple(saved[name].shape)} there and {tuple(tensor.shape)} here"
        for name, tensor in current.items()
        if name in saved and saved[name].shape != tensor.shape
    ]
    differences += [f"{name} is missing" for name in sorted(set(current) - set(saved))]
    return differences + [f"{name} is unknown" for name in sorted(set(saved) - set(current))]


def check_labels(
    saved: Mapping[str, Sequence[str]], current: Mapping[str, Sequence[str]], checkpoint: Path
) -> None:
    """Refuse to resume with data whose labels differ from those of the checkpoint, or their order.

    Args:
        saved: Names by field, in id order, that the checkpoint was trained with.
        current: The same of the data.
        checkpoint: For the message.

    Raises:
        UserError: Naming what was added and removed, and how to start from the saved weights.
    """
    if {field: list(names) for field, names in saved.items()} == {
        field: list(names) for field, names in current.items()
    }:
        return
    changes = [f"label field {field} was added" for field in current if field not in saved]
    changes += [f"label field {field} was removed" for field in saved if field not in current]
    for field in (field for field in saved if field in current):
        added = [name for name in current[field] if name not in saved[field]]
        removed = [name for name in saved[field] if name not in current[field]]
        if added:
            changes.append(f"{field} has new names: {_shortened(added)}")
        if removed:
            changes.append(f"{field} lacks {_shortened(removed)}")
    raise UserError(
        f"the labels of the data differ from those that {checkpoint} was trained with: "
        f"{'; '.join(changes) or 'they are in another order'}. To train on with these labels, "
        f"start a new run from its weights: --init_from {checkpoint / 'pipeline'} --out NEW_FOLDER"
    )


def _shortened(names: Sequence[str], limit: int = 5) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


# The result of a run: a pipeline folder, or an adapter folder.

_EMA_FILE = "ema.safetensors"


@dataclass
class SavedPipeline:
    """The parts of a saved pipeline other than its network.

    Attributes:
        scheduler: Samples from a model trained on the run's objective.
        id2label: Names of the labels, `{field: {id: name}}`.
        data: The `DataConfig` as a dict, so that an evaluation holds out the same pictures. For
            latents it is that of the pictures they were made from.
        latent_space: What the pipeline decodes with; None for pixels.
    """

    folder_name: ClassVar[str] = "pipeline"

    scheduler: SchedulerMixin
    id2label: dict[str, dict[int, str]]
    data: dict[str, Any]
    latent_space: LatentSpace | None = None

    def build_pipeline(self, network: ModelMixin) -> ComplexityDiTPipeline:
        """A pipeline of this network and these parts."""
        decoder = {}
        if (space := self.latent_space) is not None:
            decoder = {"vae": space.vae, "latents_mean": space.mean, "latents_std": space.std}
        return ComplexityDiTPipeline(network, self.scheduler, id2label=self.id2label, **decoder)

    def save(self, network: ModelMixin, folder: Path) -> None:
        """Write a pipeline folder with `data.json` in it."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DATA_FILE).write_text(json.dumps(self.data, indent=2) + "\n")
        self.build_pipeline(network).save_pretrained(folder)  # its model card reads data.json

    def save_ema(self, network: ModelMixin, checkpoint: Path) -> None:
        """Write the averaged weights into a checkpoint, ready to sample from."""
        self.save(network, checkpoint / self.folder_name)

    def load_ema(
        self, checkpoint: Path, label_names: Mapping[str, Sequence[str]], config: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Read the averaged weights by the network's own names.

        Args:
            checkpoint: Its folder.
            label_names: Those of the data, in id order.
            config: The config of the network that is to load them.

        Raises:
            UserError: The labels of the data differ, or the network is another one.
            OSError: A file cannot be read; likewise ValueError, KeyError and safetensors' error.
        """
        pipeline = checkpoint / self.folder_name
        shadow = load_file(pipeline / "transformer" / "diffusion_pytorch_model.safetensors")
        network = json.loads((pipeline / "transformer" / "config.json").read_text())
        id2label = json.loads((pipeline / "model_index.json").read_text())["id2label"]
        # JSON turned the ids into strings and sorted the fields.
        names = {
            field: [id2label[field][str(i)] for i in range(len(id2label[field]))]
            for field in network["label_fields"]
        }
        check_labels(names, label_names, checkpoint)
        check_meaning(network, config, f"{checkpoint}")
        return shadow


@dataclass
class SavedAdapter(SavedPipeline):
    """The parts of a saved adapter other than its matrices.

    Attributes:
        base: Folder or Hub id of the pipeline that it was trained on.
        base_sha256: Digest of that pipeline's transformer.
    """

    folder_name: ClassVar[str] = "adapter"

    base: str = ""
    base_sha256: str = ""

    def save(self, network: ModelMixin, folder: Path) -> None:
        """Write an adapter folder: the file of diffusers, `adapter.json`, `data.json`, a card."""
        ComplexityDiTPipeline.save_lora_weights(
            folder, network.adapter_state_dict(), network.adapter_settings()
        )
        is_local = Path(self.base).is_dir()
        about = {
            # Relative, so that base and adapter can be moved together.
            "base": os.path.relpath(self.base, folder) if is_local else self.base,
            "base_sha256": self.base_sha256,
            "labels": network.added_labels,
        }
        (folder / ADAPTER_FILE).write_text(json.dumps(about, indent=2) + "\n")
        (folder / DATA_FILE).write_text(json.dumps(self.data, indent=2) + "\n")
        write_card(folder)

    def save_ema(self, network: ModelMixin, checkpoint: Path) -> None:
        """As for a pipeline, and the averaged parameters by name, for an exact resume."""
        super().save_ema(network, checkpoint)
        save_file(_trainable_tensors(network), checkpoint / _EMA_FILE)

    def load_ema(
        self, checkpoint: Path, label_names: Mapping[str, Sequence[str]], config: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        about = json.loads((checkpoint / self.folder_name / ADAPTER_FILE).read_text())
        if about["base_sha256"] != self.base_sha256:
            raise UserError(
                f"{checkpoint} is an adapter of another network than {self.base}: give the "
                "--init_from that its run was started with"
            )
        added = {
            field: names
            for field in label_names
            if (names := list(label_names[field])[len(self.id2label[field]) :])
        }
        if about["labels"] != added:
            raise UserError(
                f"{checkpoint} adds the labels {about['labels']} and this run {added or 'none'}: "
                "give the data and --lora.labels that it was started with, or another --out"
            )
        return load_file(checkpoint / _EMA_FILE)


# The state of a run.

STATE_FILE = "state.json"


@dataclass
class TrainState:
    """All that training updates.

    Attributes:
        model: The unwrapped raw model; its parameters may be shards (FSDP2).
        ema: Exponential moving average of its trainable parameters, placed and sharded alike.
        optimizer: The optimizer, plain or in accelerate's wrapper.
        lr_scheduler: The learning-rate schedule.
        guard: The spike guard; None if it is off.
        step: Number of optimizer steps done.
    """

    model: ComplexityDiTTransformer2DModel
    ema: EMAModel
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    guard: SpikeGuard | None = None
    step: int = 0

    def trainable_parameters(self) -> list[nn.Parameter]:
        """All parameters of the network, or those of its adapter."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def reset_ema(self) -> None:
        """Restart the average at the current weights, placed and sharded as they are now."""
        self.ema.shadow_params = [p.detach().clone() for p in self.trainable_parameters()]

    @torch.no_grad()
    def export(self, weights: Literal["raw", "ema"]) -> ComplexityDiTTransformer2DModel:
        """An unsharded copy of the network on the CPU. All processes call it together."""
        copy, averaged = blank_copy(self.model), iter(self.ema.shadow_params)
        for parameter, current in zip(copy.parameters(), self.model.parameters(), strict=True):
            is_averaged = weights == "ema" and current.requires_grad
            parameter.copy_(full_tensor(next(averaged) if is_averaged else current))
        return copy.eval()

    def save(self, checkpoints: Path, saved: SavedPipeline, config: dict[str, Any]) -> Path:
        """Write `checkpoints/step-XXXXXXXX`. All processes call it, the main one writes.

        Raises:
            UserError: The disk is full or not writable. Nothing half-written stays, and older
                checkpoints are intact.
        """
        averaged, weights = self.export("ema"), _trainable_tensors(self.model)
        moments, groups = _flatten_optimizer(self.optimizer.state_dict())
        ema = self.ema.state_dict()
        ema.pop("shadow_params")
        state = process_state()
        meta = {
            "step": self.step,
            "processes": state.num_processes if state else 1,
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
                    saved.save_ema(averaged, folder)
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
        self, checkpoint: Path, saved: SavedPipeline, label_names: Mapping[str, Sequence[str]]
    ) -> dict[str, Any]:
        """Restore the exact state that a checkpoint was written with, in any number of processes.

        Args:
            checkpoint: Its folder.
            saved: Of this run; reads the averaged weights.
            label_names: Those of the data, in id order.

        Returns:
            The contents of `state.json`: step, processes, config, ...

        Raises:
            UserError: A file is missing or unreadable, the labels of the data differ, or the
                checkpoint is of another model.
        """
        try:
            meta = read_json_object(checkpoint / STATE_FILE)
            weights = load_file(checkpoint / "model.safetensors")
            moments = load_file(checkpoint / "optimizer.safetensors")
            shadow = saved.load_ema(checkpoint, label_names, self.model.config)
        except UserError:
            raise
        except Exception as error:  # OSError, JSONDecodeError, SafetensorError and the like
            raise UserError(f"cannot read checkpoint {checkpoint}: {error}") from error
        try:
            self._restore(meta, weights, moments, shadow, checkpoint)
        except UserError:
            raise
        # Whatever is missing or of another type in state.json fails where it is first used.
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise UserError(
                f"{checkpoint} is damaged or of another version: state.json and the optimizer's "
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
        step = meta["step"]
        if not fits(step, int) or step < 0 or not fits(meta["config"], dict[str, Any]):
            raise ValueError(f"step {step!r}")
        _load_weights(self.model, weights, checkpoint)
        self.ema.load_state_dict(meta["ema"])
        names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        for name, parameter in zip(names, self.ema.shadow_params, strict=True):
            parameter.copy_(shard_like(shadow[name], parameter))
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        try:
            self.optimizer.load_state_dict(
                _unflatten_optimizer(moments, meta["optimizer_groups"], parameters)
            )
        except ValueError as error:  # other groups, or groups of other sizes
            raise UserError(
                f"{checkpoint} was written by another optimizer ({error}): use the --optim.name "
                "it was trained with, or start a new run in another --out"
            ) from error
        self.lr_scheduler.load_state_dict(meta["lr_scheduler"])
        if self.guard is not None and meta.get("guard"):
            self.guard.load_state_dict(meta["guard"])
        self.step = step


def _trainable_tensors(model: nn.Module) -> dict[str, Tensor]:
    trainable = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return {name: full_tensor(p.detach()).contiguous() for name, p in trainable}


@torch.no_grad()
def _load_weights(model: nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    """Load the weights of exactly this model.

    Raises:
        UserError: Naming tensors that differ.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if differences := compare_shapes(weights, trainable):
        raise UserError(
            f"{source} is a checkpoint of another model ({len(differences)} tensors differ): "
            f"{'; '.join(differences[:3])}; use the config it was trained with, or another --out"
        )
    for name, parameter in trainable.items():
        parameter.copy_(shard_like(weights[name], parameter))


def _flatten_optimizer(state: dict[str, Any]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The state of an optimizer as named tensors and JSON, so that no pickle is needed."""
    tensors = {
        f"{index}.{name}": full_tensor(value).contiguous()
        for index, entries in state["state"].items()
        for name, value in entries.items()
    }
    return tensors, state["param_groups"]


def _unflatten_optimizer(
    tensors: dict[str, Tensor], groups: list[dict], parameters: list[Tensor]
) -> dict[str, Any]:
    """The inverse. An entry of a parameter's shape is sharded as the parameter is."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        if value.shape == parameter.shape:
            value = shard_like(value, parameter)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": groups}


def build_state(model: ComplexityDiTTransformer2DModel, config: TrainConfig) -> TrainState:
    """A model with optimizer, schedule, EMA and spike guard for a run."""
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
    guard = SpikeGuard(optim) if optim.spike_factor else None
    return TrainState(model, ema, optimizer, lr_scheduler, guard)


def prepared_state(
    network: ComplexityDiTTransformer2DModel, config: TrainConfig, accelerator: Accelerator
) -> tuple[TrainState, nn.Module]:
    """`build_state` on the devices and processes of the run, and the wrapped model to call.

    The order matters: blocks are compiled before FSDP2 hooks into them, and the average restarts
    from the parameters as they are placed after that.
    """
    state = build_state(network, config)
    if config.compile == "regional":
        network.compile_repeated_blocks(fullgraph=True)
    model, state.optimizer = accelerator.prepare(state.model, state.optimizer)
    state.reset_ema()
    return state, model
