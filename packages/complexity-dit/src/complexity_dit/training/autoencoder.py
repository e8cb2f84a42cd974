"""The training of an autoencoder: the loop and the files of `train`, with another step.

The autoencoder learns from L1 and the L1 of differences of neighbouring pixels, later also from a
critic of patches. The critic's pull on the pictures is scaled to that of the other losses, as in
the balancer of EnCodec (Défossez et al., arXiv 2210.13438): its weight is a share of their
gradient, whatever the scale of its logits.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from complexity_dit.config import AUTOENCODER_KIND, DATA_FILE, AutoencoderConfig, EvalConfig
from complexity_dit.data.dataset import PaintingDataset, load_data
from complexity_dit.distributed import main_first, on_main
from complexity_dit.evaluation.autoencoder import (
    check_size,
    encoded,
    evaluate_autoencoder,
    latent_statistics,
    psnr,
    save_strip,
)
from complexity_dit.evaluation.breakdown import vae_reconstruction
from complexity_dit.evaluation.features import draw
from complexity_dit.evaluation.image_sets import dataset_images
from complexity_dit.evaluation.report import format_result
from complexity_dit.models.autoencoder import TinyAutoencoder
from complexity_dit.seeding import SEEDING
from complexity_dit.training.batches import PictureBatches
from complexity_dit.training.callbacks import Callback, TrainLog
from complexity_dit.training.critic import AutoencoderAndCritic, edge_loss, hinge_loss
from complexity_dit.training.state import TrainState, prepared_state, schedule_and_average
from complexity_dit.training.train import (
    FORMER,
    chosen_compile,
    identity,
    open_run,
    resumed_settings,
    run_steps,
    sharding_plugin,
    start_files,
)
from inl_core.run.csv_log import CsvLog
from inl_core.run.errors import UserError
from inl_core.run.files import atomic_file, atomic_folder
from inl_core.run.launcher import check_launcher
from inl_core.run.ownership import check_data, table_of_owners

OWNERS = table_of_owners(
    taken="""
        steps compile data.crop data.flip crop_size
        edge_weight adversarial_weight adversarial_start critic_lr
        optim.lr optim.beta1 optim.beta2 optim.weight_decay optim.warmup_steps optim.schedule
        optim.grad_clip optim.spike_factor optim.spike_window optim.spike_limit
        ema.decay ema.power
    """,
    fixed="""
        seed batch_size mixed_precision
        data.resolution data.holdout data.num_images data.clusters data.image_column
        model.latent_channels model.patch_size model.block_out_channels model.layers_per_block
        model.decoder_layers_per_block model.pool_channels model.latent_bound
        critic_channels critic_layers optim.name optim.muon_lr optim.muon_momentum
        ema.snapshot_every ema.lengths
    """,
    free="""
        out resume log_every report_to heldout_every heldout_num_images evaluate_num_images
        evaluate_weights checkpoint_every keep_last keep_every loader_workers
        data.source data.vae data.label_fields data.strict data.num_workers
        data.text_column data.caption_template
    """,
)
"""Who decides a setting of a resumed run, see `inl_core.run.ownership`."""

SCALED_IMAGES = 2048
"""Training pictures, at most, whose latents give scaling_factor and shift_factor."""

RAMP = 0.05
"""Share of the run over which the critic's weight rises to its value."""


def train_autoencoder(config: AutoencoderConfig) -> Path:
    """Train an autoencoder, or resume its training.

    Writes into `config.out` what `train` writes of a run, with `losses.csv` and `heldout_log.csv`
    (PSNR), strips of reconstructions in `samples/`, and at the end `vae/` (a folder for
    `TinyAutoencoder.from_pretrained` and every `--vae`), `result.json` and `reconstructions.png`.

    Args:
        config: The run.

    Returns:
        The folder of the autoencoder.

    Raises:
        UserError: As `train`.
        RunStopped: As `train`.
    """
    if sharding_plugin() is not None:
        raise UserError("an autoencoder is too small to be sharded: leave FSDP out (DDP is used)")
    check_launcher(config.mixed_precision, 1, ["bf16"])  # fp16 is too coarse for the critic
    with open_run(config, AUTOENCODER_KIND, foreign=True) as (accelerator, checkpoint, meta):
        return _train(config, accelerator, checkpoint, meta)


def _train(
    config: AutoencoderConfig,
    accelerator: Accelerator,
    checkpoint: Path | None,
    meta: dict[str, Any],
) -> Path:
    out, settings = Path(config.out), dataclasses.asdict(config)
    config = dataclasses.replace(config, mixed_precision=accelerator.mixed_precision)
    changes: list[dict[str, Any]] = []
    if checkpoint is not None:
        changes = resumed_settings(OWNERS, meta, settings, checkpoint, accelerator.num_processes)
    torch.manual_seed(config.seed)
    network = AutoencoderAndCritic(
        settings=asdict(config.model),  # by name: diffusers takes what is not for a default
        critic_channels=config.critic_channels,
        critic_layers=config.critic_layers,
    )
    check_size(
        network.autoencoder, **{"data.resolution": config.data.resolution},
        crop_size=config.crop_size,
    )  # fmt: skip
    pictures, heldout = main_first(lambda: load_data(config.data, "train")), None
    if config.heldout_every or config.evaluate_num_images:
        heldout = main_first(lambda: load_data(config.data, "heldout"))
    flops = config.steps * config.batch_size * _flops(network, config)
    config = dataclasses.replace(config, compile=chosen_compile(config, meta, flops))
    state, model = prepared_state(_build_state(network, config), config, accelerator)
    saved = SavedAutoencoder(settings["data"])
    record = {
        "kind": AUTOENCODER_KIND, "config": settings, "changes": changes,
        "data": identity(pictures), "seeding": SEEDING,
        "resolved": {name: getattr(config, name) for name in FORMER},
    }  # fmt: skip
    if checkpoint is not None:
        state.load(checkpoint, saved, {})
        check_data(meta.get("data"), record["data"], checkpoint, "start a new run in another --out")
    start_files(config, accelerator, record, state.step)

    place = accelerator.process_index, accelerator.num_processes
    batches = PictureBatches(pictures, config, *place)
    means = LossMeans(out, state.step, accelerator)
    log = TrainLog(out, state.step, accelerator, state.skipped)
    callbacks: list[Callback] = []
    if config.heldout_every and heldout is not None:
        callbacks.append(Reconstructions(config, heldout, accelerator, state.step))

    def step(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, bool]:
        return autoencoder_step(accelerator, model, state, batch["pixels"], config, means)

    def save() -> Path:
        return state.save(out / "checkpoints", saved, record)

    run_steps(config, accelerator, state, batches, step, save, log, means, callbacks)
    averaged = state.export("ema").autoencoder.to(accelerator.device)

    def finish() -> None:
        rows = draw(len(pictures), SCALED_IMAGES, config.seed)
        about = latent_statistics(encoded(averaged, pictures, rows))
        averaged.register_to_config(scaling_factor=1 / about["std"], shift_factor=about["mean"])
        with atomic_folder(out / saved.folder_name) as folder:
            saved.write(averaged, folder)

    on_main(finish)
    if config.evaluate_num_images:
        _evaluate(averaged, config)
    return out / saved.folder_name


def _evaluate(autoencoder: TinyAutoencoder, config: AutoencoderConfig) -> None:
    measured = EvalConfig.brief(
        num_images=config.evaluate_num_images, weights=config.evaluate_weights,
        device=str(next(autoencoder.parameters()).device),
    )  # fmt: skip
    result = evaluate_autoencoder(autoencoder, config.data, measured)
    out = Path(config.out)

    def write() -> None:
        save_strip({"reconstructed": autoencoder}, config.data, out / "reconstructions.png")
        with atomic_file(out / "result.json") as scratch:
            scratch.write_text(json.dumps(result, indent=2) + "\n")
        print(format_result({"per_label": {}, **result}))

    on_main(write)


def _flops(network: AutoencoderAndCritic, config: AutoencoderConfig) -> int:
    """Of the convolutions of a training picture, forward and backward, without the critic."""
    side = config.crop_size or config.data.resolution
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        copy = TinyAutoencoder.from_config(network.autoencoder.config)
        copy(torch.empty(1, 3, side, side)).sample.sum().backward()  # pyright: ignore
    return counter.get_total_flops()


def _build_state(network: AutoencoderAndCritic, config: AutoencoderConfig) -> TrainState:
    own = list(network.autoencoder.parameters())
    critic_lr = config.optim.lr if config.critic_lr is None else config.critic_lr
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in own if p.ndim > 1]},
            {"params": [p for p in own if p.ndim < 2], "weight_decay": 0.0},
            {"params": list(network.critic.parameters()), "lr": critic_lr, "betas": (0.5, 0.9)},
        ],
        lr=config.optim.lr,
        betas=(config.optim.beta1, config.optim.beta2),
        weight_decay=config.optim.weight_decay,
        fused=True,
    )
    return schedule_and_average(network, optimizer, config)


def adversarial_weight(step: int, config: AutoencoderConfig) -> float:
    """Weight of the critic in the step after `step` steps: 0, then rising, then its value."""
    begin = config.adversarial_start * config.steps
    if not config.adversarial_weight or step < begin:
        return 0.0
    return config.adversarial_weight * min(1.0, (step + 1 - begin) / (RAMP * config.steps))


def autoencoder_step(
    accelerator: Accelerator,
    model: nn.Module,
    state: TrainState,
    pixels: Tensor,
    config: AutoencoderConfig,
    means: "LossMeans",
) -> tuple[Tensor, Tensor, bool]:
    """Update the autoencoder, its average and, once it is on, the critic; as `optimizer_step`.

    The pull of the losses on the reconstruction is computed first, then one backward pass of both
    networks carries it to the weights.
    """
    pixels = pixels.to(accelerator.device, non_blocking=pixels.is_pinned())
    pixels = pixels.contiguous(memory_format=torch.channels_last)  # faster for bf16 convolutions
    weight, network = adversarial_weight(state.step, config), state.model
    with accelerator.autocast():
        reconstruction, logits = model(pixels, weight > 0)
    reconstruction = reconstruction.float()
    seen = reconstruction.detach().requires_grad_()
    l1, edges = (seen - pixels).abs().mean(), edge_loss(seen, pixels)
    loss = l1 + config.edge_weight * edges
    (pull,) = torch.autograd.grad(loss, seen)
    parts = {"l1": l1, "edges": edges}
    critic_loss = torch.zeros((), device=pixels.device)
    if weight:
        with accelerator.autocast():
            fooled = -network.judge(seen).float().mean()
        (push,) = torch.autograd.grad(fooled, seen)
        squares = torch.stack([pull.square().sum(), push.float().square().sum()])
        squares = accelerator.reduce(squares, "sum")
        ratio = (squares[0] / squares[1].clamp(min=1e-24)).sqrt()
        pull = pull + weight * ratio * push
        critic_loss = hinge_loss(*logits)
        parts |= {"adversarial": fooled, "critic": critic_loss, "scale": ratio}
    accelerator.backward((reconstruction * pull).sum() + critic_loss)
    means.add(parts)
    limit = config.optim.grad_clip or math.inf
    grad_norm = accelerator.clip_grad_norm_(network.autoencoder.parameters(), limit)
    accelerator.clip_grad_norm_(network.critic.parameters(), limit)
    assert grad_norm is not None  # accelerate returns None on XLA only
    taken = state.guard is None or state.guard.admits(float(grad_norm))
    if taken:
        state.optimizer.step()
        state.ema.step(network.parameters())
    state.optimizer.zero_grad()
    state.lr_scheduler.step()
    return loss.detach(), grad_norm, taken


class LossMeans:
    """Means of the parts of the loss since the previous row, `losses.csv`.

    `l1` and `edges` of pictures in [-1, 1]; `adversarial` and `critic` once the critic is on, and
    `scale`, the factor that makes its pull as long as that of the other two.
    """

    names = ("l1", "edges", "adversarial", "critic", "scale")

    def __init__(self, out: Path, start_step: int, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.sums = torch.zeros(len(self.names), 2, device=accelerator.device)
        self.file = None
        if accelerator.is_main_process:
            self.file = CsvLog(out / "losses.csv", ["step", *self.names], start_step)

    def add(self, parts: Mapping[str, Tensor]) -> None:
        """Add the parts of one step, by name."""
        for name, value in parts.items():
            self.sums[self.names.index(name), 0] += value.detach()
            self.sums[self.names.index(name), 1] += 1

    def flush(self, step: int) -> None:
        """Write the means since the last flush, and start over."""
        sums = self.accelerator.reduce(self.sums, "sum").tolist()
        self.sums.zero_()
        means = [total / count if count else None for total, count in sums]
        if self.file is not None:
            self.file.write([(step, *means)])
        named = zip(self.names, means, strict=True)
        self.accelerator.log({f"loss/{n}": mean for n, mean in named if mean is not None}, step)


class Reconstructions(Callback):
    """PSNR of the averaged weights on held-out pictures, `heldout_log.csv`, and a strip of them.

    The strip is `<out>/samples/step-XXXXXXXX.png`.
    """

    fields = ("step", "psnr")

    def __init__(
        self,
        config: AutoencoderConfig,
        heldout: PaintingDataset,
        accelerator: Accelerator,
        start_step: int,
    ) -> None:
        self.every, self.config, self.accelerator = config.heldout_every, config, accelerator
        self.images = dataset_images(heldout, "heldout")
        self.rows = draw(len(heldout), config.heldout_num_images, config.seed).tolist()
        if accelerator.is_main_process:
            self.file = CsvLog(Path(config.out) / "heldout_log.csv", self.fields, start_step)

    def __call__(self, state: TrainState) -> None:
        network = state.export("ema").autoencoder.to(self.accelerator.device)
        on_main(partial(self._measure, network, state.step))

    def _measure(self, network: TinyAutoencoder, step: int) -> None:
        path = Path(self.config.out) / "samples" / f"step-{step:08d}.png"
        save_strip({"reconstructed": network}, self.config.data, path)
        truth = self.images.read(self.rows)
        value = float(np.mean(psnr(truth, vae_reconstruction(network)[0](truth))))
        assert self.file is not None  # this is the main process
        self.file.write([(step, value)])
        self.accelerator.log({"heldout_psnr": value}, step)


@dataclass
class SavedAutoencoder:
    """The folder of a trained autoencoder; `data` is the `DataConfig` as a dict."""

    folder_name: ClassVar[str] = "vae"

    data: dict[str, Any]

    def write(self, autoencoder: TinyAutoencoder, folder: Path) -> None:
        """Write the folder with `data.json` in it."""
        autoencoder.save_pretrained(folder)
        (folder / DATA_FILE).write_text(json.dumps(self.data, indent=2) + "\n")

    def save_ema(self, network: AutoencoderAndCritic, checkpoint: Path) -> None:
        """Write the averaged weights into a checkpoint, ready to encode with."""
        self.write(network.autoencoder, checkpoint / self.folder_name)

    def load_ema(
        self, checkpoint: Path, label_names: Mapping[str, list[str]], config: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Read averaged weights by name. The average of the critic is used nowhere, nor kept."""
        weights = checkpoint / self.folder_name / "diffusion_pytorch_model.safetensors"
        averaged = {f"autoencoder.{name}": value for name, value in load_file(weights).items()}
        return load_file(checkpoint / "model.safetensors") | averaged
