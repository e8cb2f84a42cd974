"""TrainState: everything that a run needs to go on, and checkpoints that are whole or absent.

A checkpoint folder holds

    pipeline/               the EMA weights as a pipeline folder, ready to sample from
    model.safetensors       the raw weights
    optimizer.safetensors   the optimizer's moments
    state.json              step, EMA and schedule counters, recent gradient norms, the run's config

There is no generator state and no data position to save: both are functions of (seed, step), see
`seeding`. Folders are written aside, flushed to disk and renamed, so a final name is always whole.
"""

import json
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from complexity_dit.errors import UserError
from complexity_dit.files import folder_aside
from complexity_dit.latents import LatentSpace
from complexity_dit.pipeline import ComplexityDiTPipeline
from complexity_dit.spikes import SpikeGuard
from complexity_dit.transformer import ComplexityDiTTransformer2DModel

logger = logging.getLogger(__name__)

DATA_FILE = "data.json"
"""In a pipeline folder: the `DataConfig` that it was trained with."""

_NAME = re.compile(r"step-(\d{8})")


@dataclass
class TrainState:
    """What training updates.

    Attributes:
        model: The unwrapped raw model.
        ema: Its exponential moving average.
        optimizer: The optimizer (accelerate's wrapper or plain).
        lr_scheduler: The learning-rate schedule.
        guard: The spike guard, if there is one.
        step: Optimizer steps done.
        latent_space: What its pipelines decode with; None for pixels.
    """

    model: ComplexityDiTTransformer2DModel
    ema: EMAModel
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    guard: SpikeGuard | None = None
    step: int = 0
    latent_space: LatentSpace | None = None

    def save_pipeline(
        self,
        folder: Path,
        scheduler: SchedulerMixin,
        id2label: dict[str, dict[int, str]],
        data: dict[str, Any],
    ) -> None:
        """Save a pipeline with a copy of the EMA weights; the model in training is not touched.

        Beside it goes `data.json`, which data it was trained on: an evaluation must hold out the
        same pictures. For latents that is the data they were made from.
        """
        model = type(self.model).from_config(self.model.config)
        self.ema.copy_to(model.parameters())
        decoder = {}
        if (space := self.latent_space) is not None:
            decoder = {"vae": space.vae, "latents_mean": space.mean, "latents_std": space.std}
            data = space.data
        pipeline = ComplexityDiTPipeline(model, scheduler, id2label=id2label, **decoder)
        pipeline.save_pretrained(folder)
        (folder / DATA_FILE).write_text(json.dumps(data, indent=2) + "\n")

    def save(
        self,
        checkpoints: Path,
        scheduler: SchedulerMixin,
        id2label: dict[str, dict[int, str]],
        config: dict[str, Any],
    ) -> Path:
        """Write `checkpoints/step-XXXXXXXX`.

        Raises:
            UserError: If the disk refuses; nothing half-written stays, older checkpoints are whole.
        """
        ema = self.ema.state_dict()
        ema.pop("shadow_params")
        tensors, groups = _flatten_optimizer(self.optimizer.state_dict())
        meta = {
            "step": self.step,
            "ema": ema,
            "optimizer_groups": groups,
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "guard": self.guard and self.guard.state_dict(),
            "config": config,
        }
        target = checkpoints / f"step-{self.step:08d}"
        try:
            with folder_aside(target) as folder:
                self.save_pipeline(folder / "pipeline", scheduler, id2label, config["data"])
                save_file(_named(self.model), folder / "model.safetensors")
                save_file(tensors, folder / "optimizer.safetensors")
                (folder / "state.json").write_text(json.dumps(meta, indent=1) + "\n")
        except Exception as error:  # safetensors reports a full disk as its own error type
            kept = latest_checkpoint(checkpoints)
            raise UserError(
                f"could not write {target}: {error}; the last good checkpoint is {kept or 'none'}: "
                "free space (or choose another --out) and go on with --resume auto"
            ) from error
        return target

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Continue exactly where `checkpoint` was written.

        Returns:
            The config that the checkpoint was trained with.

        Raises:
            UserError: If a file is missing or unreadable, or the shapes are another model's.
        """
        try:
            meta = json.loads((checkpoint / "state.json").read_text())
            weights = load_file(checkpoint / "model.safetensors")
            moments = load_file(checkpoint / "optimizer.safetensors")
            shadow = load_file(
                checkpoint / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors"
            )
        except (
            Exception
        ) as error:  # OSError, JSONDecodeError, SafetensorError: all mean "unreadable"
            raise UserError(f"cannot read checkpoint {checkpoint}: {error}") from error
        _load_weights(self.model, weights, checkpoint)
        self.ema.load_state_dict(meta["ema"])
        for (name, _), parameter in zip(
            self.model.named_parameters(), self.ema.shadow_params, strict=True
        ):
            parameter.copy_(shadow[name])
        self._load_optimizer(_unflatten_optimizer(moments, meta["optimizer_groups"]), checkpoint)
        self.lr_scheduler.load_state_dict(meta["lr_scheduler"])
        if self.guard is not None and meta.get("guard"):
            self.guard.load_state_dict(meta["guard"])
        self.step = meta["step"]
        return meta["config"]

    def _load_optimizer(self, saved: dict[str, Any], checkpoint: Path) -> None:
        try:
            self.optimizer.load_state_dict(saved)
        except ValueError as error:  # other groups, or groups of other sizes
            raise UserError(
                f"{checkpoint} was written by another optimizer ({error}): go on with the "
                "--optim.name it was trained with, or start anew in another --out"
            ) from error


def _named(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().contiguous() for name, p in model.named_parameters()}


def _load_weights(model: nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    """Load weights of exactly this model, or say which tensors differ."""
    own = _named(model)
    missing, extra = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
    shapes = [
        f"{name} is {tuple(weights[name].shape)} there and {tuple(own[name].shape)} here"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
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
            parameter.copy_(weights[name])


def _flatten_optimizer(state: dict[str, Any]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """An optimizer's state as named tensors and JSON, so that no pickle is needed."""
    tensors = {
        f"{index}.{name}": value.contiguous()
        for index, entries in state["state"].items()
        for name, value in entries.items()
    }
    return tensors, state["param_groups"]


def _unflatten_optimizer(tensors: dict[str, Tensor], groups: list[dict]) -> dict[str, Any]:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": groups}


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """The checkpoint with the most steps in a folder, or None."""
    found = all_checkpoints(checkpoints)
    return found[-1] if found else None


def all_checkpoints(checkpoints: Path) -> list[Path]:
    """Whole checkpoints in a folder, by step."""
    if not checkpoints.is_dir():
        return []
    return sorted(path for path in checkpoints.iterdir() if _NAME.fullmatch(path.name))


def drop_old_checkpoints(checkpoints: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints; 0 keeps all."""
    for old in all_checkpoints(checkpoints)[:-keep_last] if keep_last else []:
        shutil.rmtree(old)
