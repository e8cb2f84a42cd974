"""`transformers.Trainer` with this package's data order, weight decay, logs and checkpoints.

A checkpoint folder `step-XXXXXXXX` contains what Trainer writes: the weights as safetensors with
the tokenizer (it loads with `from_pretrained`), and, to resume, `trainer_state.json`,
`optimizer.pt`, `scheduler.pt` and `rng_state*.pth`. The last three are PyTorch files, which Trainer
reads with `weights_only=True`: that unpickler builds tensors, numbers and containers and runs no
code (for the generator states it may build numpy arrays too). `check_torch_files` refuses those
that claim more memory than their bytes fill. `training_args.bin`, a full pickle that nothing reads,
is removed. `run.json` has the settings of the run, their changes on the way, the fingerprint of
its text and the version of its packing. `SHA256SUMS` lists all files and is verified before a run
resumes.
"""

import json
import logging
import math
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from complexity_lm.adapters import fill_adapter
from complexity_lm.config import TrainConfig
from complexity_lm.conversations import IGNORED
from complexity_lm.data import POSITION_FILE, BlockOrder, BlockStream, collate
from complexity_lm.hub import report_errors
from complexity_lm.loading import check_checkpoint, write_training_file
from complexity_lm.modeling_complexity import DeepDecoderLayer
from complexity_lm.parameters import decay_parameter_names, flops_per_token
from complexity_lm.tokenizer import separator_id
from inl_core import (
    DYNAMICS_COLUMNS,
    apply_bounds,
    defer_bounds,
    draw_num_loops,
    read_dynamics,
)
from inl_core.run.checkpoints import (
    SUMS_FILE,
    drop_old_checkpoints,
    folder_of_step,
    latest_checkpoint,
    write_sums,
)
from inl_core.run.csv_log import CsvLog
from inl_core.run.errors import UserError
from inl_core.run.files import atomic_folder
from inl_core.run.ownership import keeping_settings, move_schedule
from inl_core.run.peaks import PEAK_TFLOPS
from inl_core.run.stopping import StopRequest
from inl_core.run.torch_files import check_torch_files
from inl_core.run.workers import largest

logger = logging.getLogger(__name__)

RECORD_FILE = "run.json"
"""In a checkpoint: the settings of the run, their changes on the way, and what it is trained on."""

STATE_FILE = "trainer_state.json"
"""File that Trainer writes into every checkpoint."""

_RESUME_ONLY = {STATE_FILE, RECORD_FILE, POSITION_FILE, SUMS_FILE}
_RESUME_KINDS = {".pt", ".pth", ".bin"}


def check_batch(config: TrainConfig, processes: int) -> None:
    """Raise a `UserError` for a batch that cannot be split evenly."""
    parts = processes * config.gradient_accumulation_steps
    if config.batch_size % parts:
        raise UserError(
            f"batch_size {config.batch_size} must be divisible by processes x accumulation steps, "
            f"{processes} x {config.gradient_accumulation_steps}"
        )


def compile_layers(model: nn.Module) -> None:
    """Compile each layer by itself, in place.

    For a model with a loop: a graph of the whole would be another one for each number of
    repetitions, of which torch compiles eight and then none.
    """
    for module in model.modules():
        if isinstance(module, DeepDecoderLayer):
            module.compile()


def training_arguments(
    config: TrainConfig, processes: int, evaluate: bool, streamed: bool
) -> TrainingArguments:
    """Translate the settings of a run for Trainer; `evaluate` if there is held-out text.

    `mixed_precision` and `compile` must be chosen, and not `auto`.
    """
    parts = processes * config.gradient_accumulation_steps
    optim = config.optim
    return TrainingArguments(
        # Trainer writes here; complete checkpoints are moved out of it.
        output_dir=str(Path(config.out) / "checkpoints" / ".trainer.complexity-partial"),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size // parts,
        per_device_eval_batch_size=config.batch_size // parts,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        dataloader_pin_memory=torch.accelerator.is_available(),
        # A stream restores its position itself.
        ignore_data_skip=streamed,
        seed=config.seed,
        use_cpu=not torch.accelerator.is_available(),
        bf16=config.mixed_precision == "bf16",
        torch_compile=config.compile is True,
        activation_checkpointing=config.gradient_checkpointing,
        # The model gives every parameter a gradient, so there is no need to search for unused ones.
        ddp_find_unused_parameters=False,
        optim="adamw_torch_fused",
        learning_rate=optim.lr,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        weight_decay=optim.weight_decay,
        # Trainer calls `_clip_grad_norm`, where the loss is noted, for a limit above 0 only.
        max_grad_norm=optim.grad_clip or math.inf,
        warmup_steps=optim.warmup_steps,
        lr_scheduler_type=optim.schedule,
        lr_scheduler_kwargs=optim.schedule_options,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        save_steps=config.checkpoint_every,
        eval_strategy="steps" if evaluate and config.eval_every else "no",
        eval_steps=config.eval_every or None,
        prediction_loss_only=True,
        report_to=[] if config.report_to == "none" else [config.report_to],
        remove_unused_columns=False,
    )


class LMTrainer(Trainer):
    """Trainer for packed blocks.

    `args` are the result of `training_arguments`; `bytes_per_token`, of the held-out tokens that
    are predicted, converts their loss to bits per byte; `start_step` is that of the checkpoint that
    the run continues from; `record` is what `run.json` of its checkpoints holds.

    Attributes:
        stop: To be entered by the caller around `train`: a signal saves a checkpoint and ends it.
        stopped_by: Number of the signal that ended the training, 0 for none.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: PreTrainedModel,
        args: TrainingArguments,
        tokenizer: PreTrainedTokenizerFast,
        train: datasets.Dataset | BlockStream,
        heldout: datasets.Dataset | None,
        bytes_per_token: float,
        start_step: int,
        record: dict[str, Any],
    ) -> None:
        self.config, self.bytes_per_token, self.start_step = config, bytes_per_token, start_step
        self.folder, self.record = Path(config.out), record
        self.stop, self.stopped_by = StopRequest(), 0
        self.stream = train if isinstance(train, BlockStream) else None
        is_chat = config.data.format == "chat"
        separate = config.data.separate_documents and not is_chat
        # Blocks of conversations differ in their number of answer tokens, (held-out blocks,).
        self.answers = None
        if is_chat and heldout is not None:
            self.answers = np.sum(np.asarray(heldout["labels"]) != IGNORED, axis=1)
        super().__init__(
            model,
            args,
            data_collator=partial(
                collate,
                separator=separator_id(tokenizer) if separate else None,
            ),
            train_dataset=train,  # pyright: ignore[reportArgumentType] (datasets' own type)
            eval_dataset=heldout,  # pyright: ignore[reportArgumentType]
            processing_class=tokenizer,
        )
        if args.gradient_accumulation_steps * args.world_size * config.model.num_loops > 1:
            defer_bounds(model)
        self.tokenizer = tokenizer
        self.steps_log = self.open_log("train_log.csv", "step", "loss", "grad_norm", "lr")
        self.heldout_log = self.open_log("heldout_log.csv", "step", "loss", "bits_per_byte")
        self._step_loss: Tensor | None = None
        # Kept on the device: reading each loss at once would make it wait for the host.
        self._pending: list[tuple[int, Tensor, Tensor, float]] = []
        self.remove_callback(ProgressCallback)
        self.add_callback(_Progress(self))

    def open_log(self, name: str, *fields: str) -> CsvLog | None:
        """Open a log in the run's folder; None in all processes but the main one."""
        is_main = self.is_world_process_zero()
        return CsvLog(self.folder / name, fields, self.start_step) if is_main else None

    def _run_epoch(self, *arguments: Any, **named: Any) -> None:
        """Train as Trainer does, but no step more once a run is finished: a stream never ends."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*arguments, **named)

    # Data order, weight decay, losses -----------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        if self.stream is not None:
            return None
        draws = self.config.steps * self.config.batch_size
        return BlockOrder(len(self.train_dataset), draws, self.config.seed)  # pyright: ignore[reportArgumentType]

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Apply the documented rule of the model instead of Trainer's guess by names."""
        return decay_parameter_names(model)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Run Trainer's step, with the repetitions of this step, and record the loss."""
        if self.config.loop_sampling != "fixed":
            step, mean = self.state.global_step, self.config.model.num_loops
            count = draw_num_loops(mean, self.config.loop_sampling, self.config.seed, step)
            inputs = inputs | {"num_loops": count}
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step_loss = loss if self._step_loss is None else self._step_loss + loss
        return loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **named: Any
    ) -> Any:
        """Weight the held-out loss of blocks by their answers: the mean is one over tokens."""
        loss, *others = super().prediction_step(model, inputs, *arguments, **named)
        if self.answers is not None:
            labels = inputs["labels"]
            loss = loss * ((labels != IGNORED).sum() / (len(labels) * self.answers.mean()))
        return loss, *others

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        apply_bounds(model)  # to the gradient of the whole batch
        norm = super()._clip_grad_norm(model)
        loss, self._step_loss = self._step_loss, None
        assert loss is not None
        step, rate = self.state.global_step + 1, self._get_learning_rate()
        self._pending.append((step, loss, torch.as_tensor(norm), rate))
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as Trainer does, with bits per byte in addition to the held-out loss."""
        if "eval_loss" in logs:
            bits = logs["eval_loss"] / math.log(2) / self.bytes_per_token
            logs["eval_bits_per_byte"] = bits
            if self.heldout_log:
                self.heldout_log.write([(self.state.global_step, logs["eval_loss"], bits)])
        super().log(logs, start_time)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Save a checkpoint at a new lowest held-out loss; it is kept until there is a lower one.

        Its step is in the record of the run instead of Trainer's state, which names the folder that
        Trainer wrote into.
        """
        best = self.record.get("best")
        loss = metrics["eval_loss"]
        if not self.config.keep_best or (best and loss >= best["loss"]):
            return False
        self.record["best"] = {"step": self.state.global_step, "loss": loss}
        self.control.should_save = True
        return True

    def log_to_tracker(self, logs: dict[str, float]) -> None:
        """Send numbers to the tracker only; those passed to `log` stay in `trainer_state.json`.

        The callbacks are called directly: the callback handler would take this for the log of the
        step and drop the latter, in this process but not in the others.
        """
        for callback in self.callback_handler.callbacks:
            callback.on_log(self.args, self.state, self.control, logs=logs)

    def stop_if_not_finite(self) -> float | None:
        """Write the pending losses, averaged over the processes, and return the last one.

        Raises:
            UserError: A loss or gradient norm is not finite; names the first such step, from which
                on nothing is written.
        """
        if not self._pending:
            return None
        numbers = torch.stack(
            [torch.stack([loss, norm.to(loss)]) for _, loss, norm, _ in self._pending]
        ).double()
        means: Any = self.accelerator.reduce(numbers, "mean")
        rows = [
            (step, loss, norm, lr)
            for (step, _, _, lr), (loss, norm) in zip(self._pending, means.tolist(), strict=True)
        ]
        self._pending.clear()
        finite = means.isfinite().all(dim=1).tolist()
        bad = finite.index(False) if False in finite else None
        if self.steps_log:
            self.steps_log.write(rows[:bad])
        if bad is not None:
            step, loss, norm, _ = rows[bad]
            last = latest_checkpoint(self.folder / "checkpoints")
            optim = self.config.optim
            raise UserError(
                f"step {step}: loss {loss}, gradient norm {norm}; training stopped. The last "
                f"good checkpoint is {last or 'none'}: lower --optim.lr (now {optim.lr:g}) or "
                f"raise --optim.warmup_steps (now {optim.warmup_steps}), then --resume auto"
            )
        return rows[-1][1]

    # Checkpoints --------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save as Trainer does, into a partial folder that is renamed once all processes wrote."""
        checkpoints = self.folder / "checkpoints"
        partial = Path(str(self.args.output_dir))
        step = self.state.global_step
        target = folder_of_step(checkpoints, step)
        is_main = self.is_world_process_zero()
        if is_main:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if is_main:
                written = partial / f"checkpoint-{step}"
                self._complete(written)
                (written / RECORD_FILE).write_text(json.dumps(self.record, indent=1) + "\n")
                if self.stream is not None:
                    self.stream.save(written, step * self.config.batch_size)
                write_sums(written)
                _move(written, target)
                kept = [self.record["best"]["step"]] if "best" in self.record else []
                drop_old_checkpoints(checkpoints, self.config.keep_last, kept=kept)
        # safetensors and torch raise errors of their own for a full disk.
        except Exception as error:
            last = latest_checkpoint(checkpoints)
            raise UserError(
                f"could not write {target}: {error}; the last good checkpoint is {last or 'none'}: "
                "free space (or choose another --out) and continue with --resume auto"
            ) from error
        finally:
            if is_main:
                shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def save_final(self, target: Path) -> int:
        """Write the model folder; to be called in every process: a sharded model is gathered.

        Returns:
            The step of the model: with `keep_best` that of the lowest held-out loss, else the last.
        """
        if self.config.keep_best:
            step: int = self.record["best"]["step"]
            if self.is_world_process_zero():
                _copy_model(folder_of_step(self.folder / "checkpoints", step), target)
            return step
        partial = target.with_name(f".trainer.{target.name}.complexity-partial")
        self.save_model(str(partial), _internal_call=True)
        if self.is_world_process_zero():
            self._complete(partial)
            _move(partial, target)
            shutil.rmtree(partial)
            # Trainer makes this one at its start; with no step left to train, no save removed it.
            shutil.rmtree(str(self.args.output_dir), ignore_errors=True)
        return self.state.global_step

    def _complete(self, folder: Path) -> None:
        """Remove the pickle that Trainer wrote into a model folder, and add the training file."""
        (folder / "training_args.bin").unlink(missing_ok=True)
        if self.config.lora.rank:  # the code of the model is in the folder of the base
            for path in folder.glob("*.py"):
                path.unlink()
        write_training_file(folder, self.config.data, self.tokenizer)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        assert isinstance(self.model, PreTrainedModel)
        checkpoint = Path(resume_from_checkpoint)
        if self.stream is not None:
            self.stream.load(checkpoint)
        if self.config.lora.rank:
            check_torch_files(checkpoint)
            with report_errors(f"cannot read checkpoint {checkpoint}"):
                fill_adapter(self.model, checkpoint)
            return
        check_checkpoint(self.model, checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the moments; the settings of optimizer and schedule stay those of this run."""
        if checkpoint is None:
            return
        scheduler: Any = self.lr_scheduler
        schedule = scheduler.state_dict()
        with (
            report_errors(f"cannot read the optimizer state of {checkpoint}"),
            keeping_settings(self.optimizer),  # pyright: ignore[reportArgumentType]
        ):
            super()._load_optimizer_and_scheduler(checkpoint)
        scheduler.load_state_dict(schedule)
        move_schedule(scheduler, self.state.global_step)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with report_errors(f"cannot read the generator states of {checkpoint}"):
            super()._load_rng_state(checkpoint)


def _move(written: Path, target: Path) -> None:
    """Move the files that Trainer wrote to their final folder, all or none."""
    with atomic_folder(target) as folder:
        for path in written.iterdir():
            path.replace(folder / path.name)


def _copy_model(checkpoint: Path, target: Path) -> None:
    """Copy what `from_pretrained` reads of a checkpoint, without the state of its training."""
    with atomic_folder(target) as folder:
        for path in checkpoint.iterdir():
            if path.name not in _RESUME_ONLY and path.suffix not in _RESUME_KINDS:
                shutil.copy(path, folder)


class _Progress(TrainerCallback):
    """Progress, stop requests, and a check of the losses before they are logged or saved.

    Progress is a bar in a terminal, else a line in the log for every `log_every` steps. Speed since
    the last one, memory, and the share of the device's peak where that is known go to the tracker.
    """

    def __init__(self, trainer: LMTrainer) -> None:
        self.trainer = trainer
        config, model = trainer.config, trainer.model
        assert isinstance(model, PreTrainedModel)
        peak = config.peak_tflops
        device = trainer.accelerator.device
        in_bf16 = config.mixed_precision == "bf16" or model.dtype == torch.bfloat16
        if peak is None and in_bf16 and device.type == "cuda":
            peak = PEAK_TFLOPS.get(torch.cuda.get_device_name(device))
        # Tokens per second of all devices at their peak.
        self.limit = None
        if peak is not None:
            flops = flops_per_token(model, config.data.context)
            self.limit = 1e12 * peak * trainer.args.world_size / flops
        self.bar: tqdm | None = None
        self.last_step, self.last_time = 0, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A checkpoint would bring the intervals of the run that wrote it.
        state.compute_steps(args, state.max_steps)
        self.last_step, self.last_time = state.global_step, time.perf_counter()
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="training", dynamic_ncols=True,
            disable=None if state.is_world_process_zero else True,
        )  # fmt: skip

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        assert self.bar is not None
        self.bar.update()
        trainer.stopped_by = largest(trainer.stop.number)
        if trainer.stopped_by:
            control.should_save = control.should_training_stop = True
        if trainer.config.keep_best and state.global_step >= state.max_steps:
            control.should_evaluate = True
        if not (control.should_log or control.should_evaluate or control.should_save):
            return
        loss, now = trainer.stop_if_not_finite(), time.perf_counter()
        if loss is None:
            return
        tokens = (state.global_step - self.last_step) * trainer.config.batch_size
        speed = tokens * trainer.config.data.context / (now - self.last_time)
        self.last_step, self.last_time = state.global_step, now
        memory = memory_used(trainer.accelerator.device) / 1e9
        shown = {"tokens_per_second": speed, "memory_gb": memory}
        words = f"{speed:.0f} tokens/s, {memory:.2f} GB"
        if self.limit is not None:
            shown["mfu"] = speed / self.limit
            words += f", MFU {speed / self.limit:.1%}"
        trainer.log_to_tracker(shown)
        self.bar.set_postfix_str(f"loss {loss:.4f}, {words}")
        if self.bar.disable and state.is_world_process_zero:
            logger.info(
                "step %d of %d: loss %.4f, %s", state.global_step, state.max_steps, loss, words
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.bar is not None
        self.bar.close()


def memory_used(device: torch.device) -> int:
    """Bytes: on an accelerator the most that tensors took so far, else those of the process."""
    if device.type == "cpu":
        return psutil.Process().memory_info().rss
    return torch.accelerator.max_memory_allocated(device)


class DynamicsMonitor(TrainerCallback):
    """Record the dynamics on a fixed text, one row per layer in `dynamics.csv`, and in the tracker.

    The columns are step, layer and `inl_core.DYNAMICS_COLUMNS`. All processes run the forward pass
    on the probe, token ids (B, N), because the model may be sharded.
    """

    def __init__(self, trainer: LMTrainer, probe: Tensor) -> None:
        self.trainer, self.probe = trainer, probe
        self.file = trainer.open_log("dynamics.csv", "step", "layer", *DYNAMICS_COLUMNS)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the dynamics every `dynamics_every` steps."""
        if state.global_step % self.trainer.config.dynamics_every:
            return
        model = kwargs["model"]
        with self.trainer.accelerator.autocast():
            probe = {"input_ids": self.probe.to(model.device), "use_cache": False}
            layers = read_dynamics(model, probe)
        if self.file and layers:
            self.file.write(
                [state.global_step, name, *(stats[key] for key in DYNAMICS_COLUMNS)]
                for name, stats in layers.items()
            )
            self.trainer.log_to_tracker(
                {
                    f"dynamics/{name}/{key}": value
                    for name, stats in layers.items()
                    for key, value in stats.items()
                }
            )
