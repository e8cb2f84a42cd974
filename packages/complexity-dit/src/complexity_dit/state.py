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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from complexity_dit.distributed import Processes
from complexity_dit.models.adapters import blank_copy
from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel
from complexity_dit.parts import PipelineParts
from complexity_dit.sharding import shared_out, whole
from complexity_dit.spikes import SpikeGuard
from inl_core.run.checkpoints import folder_of_step, latest_checkpoint, write_sums
from inl_core.run.errors import UserError
from inl_core.run.files import folder_aside
from inl_core.run.json_files import fits, read_json_object

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

    def average_from_here(self) -> None:
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
        self, checkpoints: Path, parts: PipelineParts, config: dict[str, Any], processes: Processes
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
                with folder_aside(target) as folder:
                    parts.save_average(average, folder)
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
        self, checkpoint: Path, parts: PipelineParts, label_names: Mapping[str, Sequence[str]]
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
            shadow = parts.load_average(checkpoint, label_names, self.model.config)
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
            parameter.copy_(shared_out(shadow[name], parameter))
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
                parameter.copy_(shared_out(weights[name], parameter))


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
            value = shared_out(value, parameter)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": groups}
