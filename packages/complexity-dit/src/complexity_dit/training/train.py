"""The training of a diffusion transformer: one loop that knows neither the objective nor the files.

`train` opens a run (`open_run`), `_train` sets it up, `run_steps` is the loop, and `optimizer_step`
is what each turn of it does. Below them are the parts of the setup: accelerator and tracker.
`autoencoder` trains another network in the same runs.
"""

import dataclasses
import importlib.util
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin
from diffusers import ModelMixin
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from tqdm.auto import tqdm

from complexity_dit.config import RUN_KIND, DataConfig, RunConfig, TrainConfig
from complexity_dit.data.captions import text_columns
from complexity_dit.data.clusters import (
    CLUSTER_FIELD,
    fit_clusters,
    nearest_clusters,
    read_clusters,
    with_clusters,
)
from complexity_dit.data.latents import (
    TrainingData,
    load_training_data,
    on_training_device,
    open_latent_space,
)
from complexity_dit.distributed import (
    is_main,
    largest,
    main_first,
    on_main,
    pick_device,
    process_count,
)
from complexity_dit.hashing import weights_sha256
from complexity_dit.labels import LabelTable
from complexity_dit.models.text import text_width
from complexity_dit.pipelines.sampling import find_pipeline, load_pipeline
from complexity_dit.seeding import SEEDING
from complexity_dit.training.batches import (
    PictureBatches,
    StepBatches,
    images_per_pass,
    moved,
    step_loader,
)
from complexity_dit.training.callbacks import Callback, NoiseLevels, TrainLog, build_callbacks
from complexity_dit.training.network import adapt, build_model, start_from
from complexity_dit.training.objective import build_scheduler, training_loss
from complexity_dit.training.state import (
    STATE_FILE,
    SavedPipeline,
    TrainState,
    build_state,
    full_tensor,
    prepared_state,
    read_state,
    trainable,
)
from complexity_dit.training.text import (
    FrozenEncoder,
    PromptedNetwork,
    seeded_text_encoder,
    text_inputs,
)
from inl_core import apply_bounds, draw_num_loops
from inl_core.run.automatic import (
    AUTO,
    Choice,
    choose_compile,
    choose_precision,
    kept,
    kept_settings,
    settled,
    warn_without_units,
)
from inl_core.run.checkpoints import drop_old_checkpoints, open_run_folder
from inl_core.run.errors import RunStopped, UserError
from inl_core.run.files import atomic_file, atomic_folder
from inl_core.run.launcher import check_compiler, check_launcher
from inl_core.run.ownership import (
    Owner,
    check_data,
    history_comment,
    table_of_owners,
    take_settings,
)
from inl_core.run.settings import dump_settings
from inl_core.run.stopping import StopRequest
from inl_core.run.workers import report_dead_workers

logger = logging.getLogger(__name__)

OWNERS = table_of_owners(
    taken="""
        steps gradient_accumulation_steps compile gradient_checkpointing loop_sampling
        data.crop data.flip model.token_drop_rate model.token_drop_until
        objective.time_sampling objective.logit_mean objective.logit_std objective.shift
        objective.sampling_shift objective.label_dropout objective.label_dropout_all
        objective.auxiliary_weight
        optim.lr optim.muon_lr optim.muon_momentum optim.beta1 optim.beta2 optim.weight_decay
        optim.warmup_steps optim.schedule optim.grad_clip
        optim.spike_factor optim.spike_window optim.spike_limit
        ema.decay ema.power lora.dropout text_encoder.caption_dropout
    """,
    fixed="""
        seed batch_size mixed_precision
        data.resolution data.holdout data.num_images data.clusters data.image_column
        model.size model.patch_size model.dynamics_placement model.dynamics_adaptive
        model.token_drop_start model.token_drop_end model.auxiliary_layer model.num_loops
        model.overrides
        objective.prediction_type objective.network_output
        optim.name ema.snapshot_every ema.lengths lora.rank lora.alpha lora.targets lora.labels
        data.text_column data.caption_template text_encoder.trainable text_encoder.bidirectional
        text_encoder.max_length text_encoder.overrides
    """,
    free="""
        out resume init_from log_every report_to noise_bins dynamics_every heldout_every
        heldout_num_images sample_every evaluate_every evaluate_num_images evaluate_reference
        evaluate_dtype checkpoint_every keep_last keep_every loader_workers
        data.source data.vae data.label_fields data.strict data.num_workers model.preset
        text_encoder.source
    """,
)
"""Who decides a setting of a resumed run, see `inl_core.run.ownership`.

Fixed is what the weights mean and which data a step reads. Paths of data and VAE are free, because
folders move: what they hold, and the labels, are compared.
"""


FORMER = {"mixed_precision": "no", "compile": "no"}
"""What may be `auto`, with the defaults of versions that had no `auto`."""


def train(config: TrainConfig, build: Callable[..., ModelMixin] = build_model) -> Path:
    """Run or resume a training.

    Writes into `config.out`: `config.yaml`, `train_log.csv` (one row per step), `logs/`
    (tensorboard), `checkpoints/step-XXXXXXXX/`, the files of the callbacks (see `callbacks`) and,
    at the end, `pipeline/` with the EMA weights, or `adapter/` if `config.lora` asks for one.

    Args:
        config: The run.
        build: Makes the network from (config, data). Any denoiser with the forward arguments and
            config fields that `ComplexityDiTPipeline` reads can be trained.

    Returns:
        The folder of the finished pipeline or adapter.

    Raises:
        UserError: Bad input, a folder that another run writes to, a loss that is not finite, a full
            disk, a damaged checkpoint, or a process of the run that died.
        RunStopped: After SIGTERM or SIGINT, once the current step is finished and saved.
    """
    parts = config.gradient_accumulation_steps
    if config.text_encoder.trains and sharding_plugin() is not None:
        raise UserError(
            f"text_encoder.source {config.text_encoder.source} is trained whole in every process, "
            "and the launcher asks for FSDP: use a frozen text encoder, or a launcher without FSDP"
        )
    with open_run(config, RUN_KIND, build is not build_model, parts) as run:
        return _train(config, build, *run)


@contextmanager
def open_run(
    config: RunConfig, kind: str, foreign: bool = False, parts: int = 1
) -> Iterator[tuple[Accelerator, Path | None, dict[str, Any]]]:
    """Claim the folder of a run, choose its precision and join its processes.

    Args:
        config: The run.
        kind: Mark of its folder.
        foreign: Whether a step may make no use of some parameters.
        parts: That the batch of a step is split into.

    Yields:
        The accelerator; the checkpoint to resume from, None for a new run; and the contents of its
        `state.json`, with `kept`, its settings with what `auto` stood for.
    """
    check_start(config, parts)
    accelerator = None
    with own_accelerator_state():
        try:
            images_per_pass(config.batch_size, process_count(), parts)
            with (
                report_dead_workers(),
                open_run_folder(
                    Path(config.out), config.resume, STATE_FILE, kind, on_main
                ) as checkpoint,
            ):
                meta = read_state(checkpoint) if checkpoint is not None else {"config": {}}
                if checkpoint is not None:
                    if (found := meta.get("kind", RUN_KIND)) != kind:
                        raise UserError(f"{checkpoint} is of a {found}; choose another --out")
                    meta["kept"] = kept(meta["config"], meta.get("resolved", {}), FORMER)
                precision = _precision(config, meta.get("kept", {}), parts)
                accelerator = make_accelerator(
                    dataclasses.replace(config, mixed_precision=precision), foreign=foreign
                )
                yield accelerator, checkpoint, meta
        finally:  # destroys the process group: no message is possible after it
            if accelerator is not None:
                accelerator.end_training()
            elif distributed.is_initialized():
                distributed.destroy_process_group()


def _train(
    config: TrainConfig,
    build: Callable[..., ModelMixin],
    accelerator: Accelerator,
    checkpoint: Path | None,
    meta: dict[str, Any],
) -> Path:
    source, before = None, meta["config"]
    if config.init_from is not None and checkpoint is None and not config.lora.rank:
        source = load_pipeline(config.init_from)
        before = {"model": source.transformer.config}
    model, objective = (
        one if isinstance(one := before.get(name), Mapping) else None
        for name in ("model", "objective")
    )
    config = dataclasses.replace(
        config,
        model=config.model.resolved(model),
        objective=config.objective.resolved(objective),
    )
    out, settings = Path(config.out), dataclasses.asdict(config)  # with what the user wrote
    config = dataclasses.replace(config, mixed_precision=accelerator.mixed_precision)
    checkpoints = out / "checkpoints"
    changes: list[dict[str, Any]] = []
    if checkpoint is not None:
        if not config.lora.rank:
            settings["init_from"] = meta["config"].get("init_from")  # it was used then, not now
        changes = resumed_settings(OWNERS, meta, settings, checkpoint, accelerator.num_processes)
    prompted = config.text_encoder.source != "none"
    data, heldout = main_first(lambda: load_training_data(config.data, "train", prompted)), None
    if config.heldout_every:
        heldout = main_first(lambda: load_training_data(config.data, "heldout", prompted))
    if not prompted:
        _say_what_is_not_read(config.data, data)
    centres, frozen = None, None
    encoder: Any = None
    if config.data.clusters:
        centres = on_main(partial(_centres, config, data, checkpoint))
        data, heldout = (_clustered(one, centres) for one in (data, heldout))
    if config.lora.rank:
        network, saved, data, heldout = adapt(config, data, heldout)
    else:
        space = open_latent_space(config.data)
        saved = SavedPipeline(
            build_scheduler(config.objective),
            {field: dict(enumerate(names)) for field, names in data.label_names.items()},
            space.data if space else settings["data"],
            space,
            LabelTable.counted(data.labels),
            centres,
        )
        own = config.model
        if prompted:
            assert data.captions is not None  # they were asked for
            saved.tokenizer, encoder = main_first(
                partial(seeded_text_encoder, config, data.captions, checkpoint)
            )
            saved.prompt_length = config.text_encoder.max_length
            width = {"caption_channels": text_width(encoder)}
            own = dataclasses.replace(own, overrides=own.overrides | width)
        torch.manual_seed(config.seed)
        network = build(dataclasses.replace(config, model=own), data)
        if source is not None:
            start_from(network, source, data.label_names, str(config.init_from), encoder)
            source = None  # its weights are not needed any more
    tokens = config.steps * config.batch_size * (data.sample_size // config.model.patch_size) ** 2
    flops = 6 * tokens * sum(p.numel() for p in network.parameters())
    config = dataclasses.replace(config, compile=chosen_compile(config, meta, flops))
    trained = network
    if prompted and config.text_encoder.trains:
        trained = PromptedNetwork(network, encoder)
    elif prompted:
        saved.text_encoder = encoder.to(accelerator.device)
        frozen = FrozenEncoder(saved.text_encoder, config.text_encoder.max_length)
    state, model = prepared_state(build_state(trained, config), config, accelerator)
    seeding = SEEDING if checkpoint is None else meta.get("seeding", 1)
    if seeding not in range(1, SEEDING + 1):
        raise UserError(f"{checkpoint} has seeding {seeding!r}: resume it with a newer version")
    record = {
        "config": settings, "changes": changes, "seeding": seeding,
        "data": identity(data, saved.text_encoder),
        "resolved": {name: getattr(config, name) for name in FORMER},
    }  # fmt: skip
    if checkpoint is not None:
        state.load(checkpoint, saved, data.label_names)
        check_data(
            meta.get("data"), record["data"], checkpoint,
            f"start a new run from its weights: --init_from {checkpoint / saved.folder_name}",
        )  # fmt: skip
    start_files(config, accelerator, record, state.step)
    if config.gradient_checkpointing:
        network.enable_gradient_checkpointing()

    place = accelerator.process_index, accelerator.num_processes
    data = on_training_device(data, accelerator.device)
    batches = StepBatches(data, config, *place, seeding, saved.tokenizer)
    log = TrainLog(out, state.step, accelerator, state.skipped)
    noise = NoiseLevels(config.noise_bins, out, state.step, accelerator)
    callbacks = build_callbacks(config, data, heldout, saved, accelerator, state.step, frozen)

    def step(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, bool]:
        if frozen is not None:
            batch = frozen(moved(batch, accelerator.device))
        return optimizer_step(accelerator, model, state, batch, config, noise)

    def save() -> Path:
        return state.save(checkpoints, saved, record)

    run_steps(config, accelerator, state, batches, step, save, log, noise, callbacks)
    averaged = state.export("ema")

    def save_final() -> None:
        with atomic_folder(out / saved.folder_name) as folder:
            saved.save(averaged, folder)

    on_main(save_final)
    return out / saved.folder_name


def run_steps(
    config: RunConfig,
    accelerator: Accelerator,
    state: TrainState,
    batches: StepBatches | PictureBatches,
    step: Callable[[dict[str, Tensor]], tuple[Tensor, Tensor, bool]],
    save: Callable[[], Path],
    log: TrainLog,
    means: Any,
    callbacks: list[Callback],
) -> None:
    """The steps of a run that are left, with its log, checkpoints and callbacks.

    Args:
        config: The run.
        accelerator: Its processes.
        state: Its state, of which `step` and `skipped` are counted here.
        batches: The input of each step, see `step_loader`.
        step: Does one of them; returns loss, gradient norm and whether weights were updated.
        save: Writes a checkpoint and returns it.
        log: The loss curve.
        means: What else is averaged between the rows of the log: `flush(step)` writes it.
        callbacks: What is done every so many steps.

    Raises:
        RunStopped: After SIGTERM or SIGINT, once the current step is finished and saved.
    """
    if state.step:  # a run killed between a checkpoint and its callbacks makes up for them
        run_callbacks(callbacks, state)
    checkpoints = Path(config.out) / "checkpoints"
    bar = tqdm(total=config.steps, initial=state.step, desc="training", unit="step",
               disable=None if accelerator.is_main_process else True)  # fmt: skip
    with bar, StopRequest() as stop:
        for batch in step_loader(batches, range(state.step, config.steps), accelerator.device):
            lr = state.lr_scheduler.get_last_lr()[0]
            loss, grad_norm, taken = step(batch)
            state.step += 1
            for average in state.averages.values():
                average.step(trainable(state.model).values())
            state.skipped += not taken
            log.add(state.step, loss, grad_norm, lr, skipped=not taken)
            bar.update()
            stopped_by = largest(stop.number)
            due = stopped_by or is_checkpoint_step(state.step, config)
            if due or state.step % config.log_every == 0:
                shown = log.flush(config)
                bar.set_postfix(shown)
                # In a file, a bar is one endless line.
                if bar.disable and accelerator.is_main_process:
                    words = ", ".join(f"{name} {value}" for name, value in shown.items())
                    logger.info("step %d of %d: %s", state.step, config.steps, words)
                means.flush(state.step)
            if due:
                newest = save()
                on_main(
                    lambda: drop_old_checkpoints(checkpoints, config.keep_last, config.keep_every)
                )
            if stopped_by and state.step < config.steps:
                raise RunStopped(
                    stopped_by,
                    f"after step {state.step} of {config.steps}, which is saved in {newest}; "
                    "resume with --resume auto",
                )
            run_callbacks(callbacks, state)


def optimizer_step(
    accelerator: Accelerator,
    model: nn.Module,
    state: TrainState,
    batch: dict[str, Tensor],
    config: TrainConfig,
    noise: NoiseLevels,
) -> tuple[Tensor, Tensor, bool]:
    """Update weights, EMA and learning rate once.

    Only the rate if the spike guard refuses the update, or if the gradient scaler of fp16 found a
    gradient that is not finite.

    Returns:
        Loss and gradient norm, both scalars on the device, and whether the weights were updated.
    """
    batch = moved(batch, accelerator.device)
    parts = config.gradient_accumulation_steps
    chunks = {name: value.chunk(parts) for name, value in batch.items()}
    total = torch.zeros((), device=accelerator.device)
    # A network of others has no such argument.
    wanted: dict[str, Any] = (
        {"return_auxiliary": True} if state.model.config.get("auxiliary_layer") else {}
    )
    if config.loop_sampling != "fixed":
        mean = state.model.config["num_loops"]
        wanted["num_loops"] = draw_num_loops(mean, config.loop_sampling, config.seed, state.step)
    for i in range(parts):
        part = {name: values[i] for name, values in chunks.items()}
        with accelerator.no_sync(model) if i + 1 < parts else nullcontext():
            with accelerator.autocast():  # DDP has its own; FSDP2 has none
                inputs = (part["x"], part["timestep"], part["labels"], part.get("kept_tokens"))
                prediction, *auxiliary = model(
                    *inputs, return_dict=False, **text_inputs(part), **wanted
                )
            loss = training_loss(prediction, part["target"]) / parts
            for early in auxiliary:
                weight = config.objective.auxiliary_weight / parts
                loss = loss + weight * training_loss(early, part["target"])
            accelerator.backward(loss)
        noise.add(part["timestep"], prediction.detach(), part["target"])
        total += loss.detach()
    apply_bounds(state.model)
    grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.optim.grad_clip or math.inf)
    assert grad_norm is not None  # accelerate returns None on XLA only
    grad_norm = full_tensor(grad_norm)
    taken = state.guard is None or state.guard.admits(float(grad_norm))
    if taken:
        scale = state.loss_scale()
        state.optimizer.step()
        # Lowered when the step is skipped. accelerate's own flag does not see fused optimizers.
        taken = state.loss_scale() >= scale
    if taken:
        state.ema.step(trainable(state.model).values())
    state.optimizer.zero_grad()
    state.lr_scheduler.step()
    return total, grad_norm, taken


def is_checkpoint_step(step: int, config: RunConfig) -> bool:
    """Whether a checkpoint is due after this step: by an interval, or because it is the last."""
    evaluate_every = getattr(config, "evaluate_every", 0)
    intervals = (config.checkpoint_every, config.keep_every, evaluate_every, config.steps)
    return any(every and step % every == 0 for every in intervals)


def run_callbacks(callbacks: list[Callback], state: TrainState) -> None:
    """Call what is due after this step and not done yet."""
    for callback in callbacks:
        due = state.step % callback.every == 0
        if due and not on_main(partial(callback.is_done, state.step)):
            callback(state)


def resumed_settings(
    owners: Mapping[str, Owner],
    meta: dict[str, Any],
    settings: dict[str, Any],
    checkpoint: Path,
    processes: int,
) -> list[dict[str, Any]]:
    """Log where the run resumes, refuse settings that it cannot change, and return its history."""
    now = kept_settings(settings, meta["kept"])
    changes = take_settings(owners, meta["kept"], now, checkpoint, meta["step"])
    logger.info("resumed from %s at step %d", checkpoint, meta["step"])
    if meta.get("processes", processes) != processes:
        logger.info(
            "the checkpoint was written by %d process(es) and is resumed by %d: data, noise and "
            "batches are the same, sums may be rounded differently", meta["processes"], processes,
        )  # fmt: skip
    return [*meta.get("changes", []), *changes]


def _precision(config: RunConfig, saved: dict[str, Any], parts: int) -> Any:
    """The precision: as set, that of the checkpoint that is resumed, or what suits the device."""
    device = pick_device("auto")
    precision = config.mixed_precision
    if precision == AUTO:
        precision = saved.get("mixed_precision") or on_main(
            lambda: settled("mixed_precision", choose_precision(device))
        )
        check_launcher(precision, parts)
    if is_main():
        warn_without_units(precision, device)
    return precision


def chosen_compile(config: RunConfig, meta: dict[str, Any], flops: float) -> Any:
    """What is compiled: as set, as in the run that is resumed, or the blocks if it pays.

    `flops` are those of the whole run.
    """
    if config.compile != AUTO:
        return config.compile
    saved = meta.get("kept", {})
    if not saved:
        choice = choose_compile(flops / process_count(), pick_device("auto"))
        words = Choice("regional" if choice.value else "no", choice.reason)
        return on_main(lambda: settled("compile", words))
    if saved["compile"] != "no":
        check_compiler()
    return saved["compile"]


def _centres(config: TrainConfig, data: TrainingData, checkpoint: Path | None) -> Tensor:
    """The centres of the clusters: of the checkpoint, of what the run starts from, or new ones."""
    count, base = config.data.clusters, config.init_from
    if checkpoint is not None and not config.lora.rank:
        return read_clusters(checkpoint / SavedPipeline.folder_name, count)
    if base is not None and CLUSTER_FIELD in load_pipeline(base).label_names:
        return read_clusters(find_pipeline(Path(base)) or Path(base), count)
    return fit_clusters(data, count, config.seed)


def _clustered(data: TrainingData | None, centres: Tensor) -> Any:
    if data is None:
        return None
    return with_clusters(data, centres, on_main(partial(nearest_clusters, data, centres)))


def _say_what_is_not_read(config: DataConfig, data: TrainingData) -> None:
    """Name columns of captions that are there, or asked for, in a run without a text encoder."""
    unread = [name for name in text_columns(data.kinds, config) if name not in data.label_names]
    if config.caption_template is not None:
        unread.append("caption_template")
    if unread and is_main():
        logger.info(
            "not used: %s; for a network that reads captions, set --text_encoder.source lm",
            ", ".join(unread),
        )


def start_files(
    config: RunConfig, accelerator: Accelerator, record: dict[str, Any], step: int
) -> None:
    """Write `config.yaml`, with the history of a resumed run, and start the tracker."""
    out = Path(config.out)
    if accelerator.is_main_process:
        with atomic_file(out / "config.yaml") as partial_file:
            comment = history_comment(record["changes"])
            partial_file.write_text(comment + dump_settings(record["config"]))
    start_tracker(config.report_to, accelerator, out, record["config"], step)


def identity(data: TrainingData, text_encoder: nn.Module | None = None) -> dict[str, Any]:
    """What a checkpoint records of the training data, to know them again."""
    known = {"fingerprint": data.fingerprint, "number of pictures": len(data)}
    if data.captions is not None:
        known["captions"] = data.captions.fingerprint
    if text_encoder is not None:
        known["text encoder"] = weights_sha256(text_encoder)
    return known


# Accelerator and tracker.


def check_start(config: RunConfig, parts: int = 1) -> None:
    """Refuse what can be known to fail before anything is read or written."""
    if config.report_to != "none" and importlib.util.find_spec(config.report_to) is None:
        raise UserError(  # accelerate would ignore it silently
            f"report_to {config.report_to} needs the package {config.report_to}, which is not "
            f"installed: pip install {config.report_to}, or choose tensorboard or none"
        )
    check_launcher(config.mixed_precision, parts)
    if config.compile not in ("no", AUTO):
        check_compiler()
    if config.compile == "max" and sharding_plugin() is not None:
        raise UserError(
            "compile max needs the whole network in every process, and the launcher asks for FSDP: "
            "use compile regional, or a launcher without FSDP"
        )


@contextmanager
def own_accelerator_state() -> Iterator[None]:
    """Leave accelerate's state as it was found: it holds one precision for the whole process."""
    before = dict(AcceleratorState._shared_state)
    AcceleratorState._reset_state()
    try:
        yield
    finally:
        AcceleratorState._reset_state()
        AcceleratorState._shared_state.update(before)


def make_accelerator(config: RunConfig, foreign: bool = False) -> Accelerator:
    """An `Accelerator`: processes and devices from the launcher, the rest from the config.

    Its `mixed_precision` must be chosen, and not `auto`. A network of others, `foreign`, may have
    parameters that a step makes no use of; ours has none.
    """
    return Accelerator(
        mixed_precision=config.mixed_precision,
        # `optimizer_step` divides the loss by the parts itself; accelerate would do it again if the
        # environment had their number.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=config.out,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=foreign)],
        fsdp_plugin=sharding_plugin(),
    )


def sharding_plugin() -> FullyShardedDataParallelPlugin | None:
    """The FSDP2 settings of a run under `accelerate launch` with FSDP; None without FSDP.

    The default policy of accelerate casts the inputs to bf16, whose spacing at a timestep of 1000
    is 4. Here weights are gathered in fp32 and the forward runs under autocast, as with DDP.
    FSDP 1 is refused: its flat parameters cannot be saved by name.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(
            f"fsdp_version is {version}; set fsdp_version: 2 in the accelerate config, as in "
            "configs/accelerate/fsdp2.yaml"
        )
    return FullyShardedDataParallelPlugin(
        mixed_precision_policy=MixedPrecisionPolicy(cast_forward_inputs=False)
    )


def start_tracker(
    name: str, accelerator: Accelerator, out: Path, settings: dict[str, Any], step: int
) -> None:
    """Report curves to tensorboard (`<out>/logs`) or wandb, in addition to the CSV files.

    The run resumes from `step`; tensorboard hides what it has beyond it.
    """
    accelerator.init_trackers(
        "logs" if name == "tensorboard" else "complexity-dit",
        init_kwargs={
            "tensorboard": {"purge_step": step + 1} if step else {},
            "wandb": {"name": out.name, "config": settings, "dir": str(out)},
        },
    )
