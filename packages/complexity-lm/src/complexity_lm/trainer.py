"""`transformers.Trainer` with this package's rules: order of data, weight decay, whole checkpoints.

A checkpoint folder `step-XXXXXXXX` holds what Trainer writes: the weights as safetensors with the
tokenizer (it loads with `from_pretrained`), and, to go on from it, `trainer_state.json`,
`optimizer.pt`, `scheduler.pt` and `rng_state*.pth`. The last three are PyTorch files, which Trainer
reads with `weights_only=True`: that unpickler builds tensors, numbers and containers and runs no
code (for the generator states it may build numpy arrays too). `training_args.bin`, a full pickle
that nothing reads, is removed. `SHA256SUMS` lists them all; it is compared before a run goes on.
"""

import math
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Sampler
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

from complexity_lm.config import TrainConfig
from complexity_lm.data import BlockOrder, BlockStream, collate
from complexity_lm.loading import check_dynamics, check_shapes, write_training_file
from complexity_lm.parameters import decay_parameter_names
from inl_core import DYNAMICS_COLUMNS, read_dynamics
from inl_core.run.checkpoints import (
    drop_old_checkpoints,
    folder_of_step,
    latest_checkpoint,
    write_sums,
)
from inl_core.run.csv_log import CsvLog
from inl_core.run.errors import UserError
from inl_core.run.files import atomic_folder

# The curve of a run's steps: gathered on the device, written in batches.


class StepLog:
    """Loss and gradient norm of every step, kept on the device until a flush writes them out.

    Asking for each loss at once would make the device wait for the host at every step.

    Args:
        path: The CSV, a row a step.
        accelerator: Averages the losses of the processes.
        start_step: The step that the run starts behind.
    """

    fields = ("step", "loss", "grad_norm", "lr")

    def __init__(self, path: Path, accelerator: Accelerator, start_step: int) -> None:
        self.accelerator = accelerator
        self.file = CsvLog(path, self.fields, start_step) if accelerator.is_main_process else None
        self.pending: list[tuple[int, Tensor, Tensor, float]] = []

    def add(self, step: int, loss: Tensor, grad_norm: Tensor, lr: float) -> None:
        self.pending.append((step, loss, grad_norm, lr))

    def flush(self) -> list[tuple[int, float, float, float]]:
        """Write what was added and return it, losses averaged over the processes.

        Rows from the first that is not finite on are returned but not written.
        """
        if not self.pending:
            return []
        numbers = torch.stack(
            [torch.stack([loss, norm.to(loss)]) for _, loss, norm, _ in self.pending]
        ).double()
        means: Any = self.accelerator.reduce(numbers, "mean")
        rows = [
            (step, loss, norm, lr)
            for (step, _, _, lr), (loss, norm) in zip(self.pending, means.tolist(), strict=True)
        ]
        self.pending.clear()
        finite = means.isfinite().all(dim=1).tolist()
        if self.file:
            self.file.write(rows[: finite.index(False)] if False in finite else rows)
        return rows


# Watching the dynamics during training: a fixed text, seen through the model every n steps.


class DynamicsMonitor(TrainerCallback):
    """Every `every` steps: a row a layer into a CSV, and the same numbers to the tracker.

    Args:
        path: The CSV; columns are step, layer and inl_core's `DYNAMICS_COLUMNS`.
        probe: Token ids (B, N), the same at every look.
        every: Steps between looks.
        start_step: The step that a resumed run starts behind.
        log: Sends numbers to the tracker.
        autocast: Makes the context of the training's forward.
        is_main: Whether this process writes; all of them run the forward, which may be sharded.
    """

    def __init__(
        self,
        path: Path,
        probe: Tensor,
        every: int,
        start_step: int,
        log: Callable[[dict[str, float]], None],
        autocast: Callable[[], AbstractContextManager],
        is_main: bool,
    ) -> None:
        self.probe, self.every, self.log, self.autocast = probe, every, log, autocast
        fields = ("step", "layer", *DYNAMICS_COLUMNS)
        self.file = CsvLog(path, fields, start_step) if is_main else None

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Look, if it is time."""
        if state.global_step % self.every:
            return
        model = kwargs["model"]
        with self.autocast():
            probe = {"input_ids": self.probe.to(model.device), "use_cache": False}
            found = read_dynamics(model, probe)
        if self.file and found:
            self.file.write(
                [state.global_step, name, *(stats[key] for key in DYNAMICS_COLUMNS)]
                for name, stats in found.items()
            )
            self.log(
                {
                    f"dynamics/{name}/{key}": value
                    for name, stats in found.items()
                    for key, value in stats.items()
                }
            )


def training_arguments(config: TrainConfig, processes: int, evaluate: bool) -> TrainingArguments:
    """A run's settings in Trainer's words.

    Args:
        config: The run.
        processes: How many processes train.
        evaluate: Whether there is held-out text to measure on the way.

    Raises:
        UserError: The batch cannot be split, or a number is out of range.
    """
    share = processes * config.gradient_accumulation_steps
    if config.batch_size < 1 or config.batch_size % share:
        raise UserError(
            f"batch_size {config.batch_size} must be divisible by processes x accumulation steps, "
            f"{processes} x {config.gradient_accumulation_steps}"
        )
    for name in ("steps", "log_every", "checkpoint_every", "eval_blocks"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} is {getattr(config, name)}; expected at least 1")
    optim = config.optim
    return TrainingArguments(
        # Trainer writes here, and whole checkpoints are moved out of it.
        output_dir=str(Path(config.out) / "checkpoints" / ".trainer.partial"),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size // share,
        per_device_eval_batch_size=max(1, config.batch_size // share),
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        dataloader_pin_memory=torch.accelerator.is_available(),
        # A streamed source finds its place by itself.
        ignore_data_skip=config.data.source.startswith("hub:"),
        seed=config.seed,
        use_cpu=not torch.accelerator.is_available(),
        bf16=config.mixed_precision == "bf16",
        torch_compile=config.compile,
        activation_checkpointing=config.gradient_checkpointing,
        # The model gives every parameter a gradient, so that nobody has to look for unused ones.
        ddp_find_unused_parameters=False,
        optim="adamw_torch_fused",
        learning_rate=optim.lr,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.grad_clip,
        warmup_steps=optim.warmup_steps,
        lr_scheduler_type=optim.schedule,
        lr_scheduler_kwargs=optim.schedule_options,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        save_steps=config.checkpoint_every,
        eval_strategy="steps" if evaluate and config.eval_every else "no",
        eval_steps=config.eval_every or None,
        prediction_loss_only=True,
        report_to=[] if config.tracker == "none" else [config.tracker],
        remove_unused_columns=False,
    )


class LMTrainer(Trainer):
    """Trainer for packed blocks.

    Args:
        config: The run.
        model: The network.
        tokenizer: Saved with every checkpoint.
        train: Blocks in memory or a `BlockStream`.
        heldout: Held-out blocks measured on the way, None for none.
        bytes_per_token: Of the held-out text, to turn its loss into bits per byte.
        start_step: The step that a resumed run starts behind.
        args: What `training_arguments` made.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        train: datasets.Dataset | BlockStream,
        heldout: datasets.Dataset | None,
        bytes_per_token: float,
        start_step: int,
        args: TrainingArguments,
    ) -> None:
        self.config, self.bytes_per_token = config, bytes_per_token
        self.folder = Path(config.out)
        self.stream = train if isinstance(train, BlockStream) else None
        super().__init__(
            model,
            args,
            data_collator=collate,
            train_dataset=train,  # pyright: ignore[reportArgumentType] (datasets' own type)
            eval_dataset=heldout,  # pyright: ignore[reportArgumentType]
            processing_class=tokenizer,
        )
        self.tokenizer = tokenizer
        self.steps_log = StepLog(self.folder / "train_log.csv", self.accelerator, start_step)
        self.heldout_log = None
        if self.is_world_process_zero():
            fields = ("step", "loss", "bits_per_byte")
            self.heldout_log = CsvLog(self.folder / "heldout_log.csv", fields, start_step)
        self._step_loss: Tensor | None = None
        self.remove_callback(ProgressCallback)
        self.add_callback(_Watch(self))

    # Order, decay, losses -----------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        if self.stream is not None:
            return None
        draws = self.config.steps * self.config.batch_size
        return BlockOrder(len(self.train_dataset), draws, self.config.seed)  # pyright: ignore[reportArgumentType]

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The model's documented rule instead of Trainer's guess by names."""
        return decay_parameter_names(model)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Trainer's own, noting the loss."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step_loss = loss if self._step_loss is None else self._step_loss + loss
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        loss, self._step_loss = self._step_loss, None
        assert loss is not None
        self.steps_log.add(
            self.state.global_step + 1, loss, torch.as_tensor(norm), self._get_learning_rate()
        )
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's own, with bits per byte beside the held-out loss."""
        if "eval_loss" in logs:
            bits = logs["eval_loss"] / math.log(2) / self.bytes_per_token
            logs["eval_bits_per_byte"] = bits
            if self.heldout_log:
                self.heldout_log.write([(self.state.global_step, logs["eval_loss"], bits)])
        super().log(logs, start_time)

    def log_to_tracker(self, logs: dict[str, float]) -> None:
        """To the tracker only: what `log` gets, `trainer_state.json` keeps for ever.

        Not by way of the callback handler, which would take this for the step's own log and drop
        that one, here and not in the other processes.
        """
        for callback in self.callback_handler.callbacks:
            callback.on_log(self.args, self.state, self.control, logs=logs)

    def stop_if_not_finite(self) -> float | None:
        """Write pending losses; returns the last one.

        Raises:
            UserError: Naming the first step whose loss or gradient norm is not finite.
        """
        rows = self.steps_log.flush()
        for step, loss, norm, _ in rows:
            if not (math.isfinite(loss) and math.isfinite(norm)):
                kept = latest_checkpoint(self.folder / "checkpoints")
                optim = self.config.optim
                raise UserError(
                    f"step {step}: loss {loss}, gradient norm {norm}; training stopped. The last "
                    f"good checkpoint is {kept or 'none'}: lower --optim.lr (now {optim.lr:g}) or "
                    f"raise --optim.warmup_steps (now {optim.warmup_steps}), then --resume auto"
                )
        return rows[-1][1] if rows else None

    # Checkpoints --------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's own into a scratch folder, renamed when every process has written its part."""
        checkpoints = self.folder / "checkpoints"
        partial = Path(str(self.args.output_dir))
        step = self.state.global_step
        target = folder_of_step(checkpoints, step)
        main = self.is_world_process_zero()
        if main:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if main:
                written = partial / f"checkpoint-{step}"
                (written / "training_args.bin").unlink(missing_ok=True)
                write_training_file(written, self.config.data, self.tokenizer)
                if self.stream is not None:
                    self.stream.save(written, step * self.config.batch_size)
                write_sums(written)
                _move(written, target)
                drop_old_checkpoints(checkpoints, self.config.keep_last)
        except (
            Exception
        ) as error:  # safetensors and torch report a full disk as errors of their own
            kept = latest_checkpoint(checkpoints)
            raise UserError(
                f"could not write {target}: {error}; the last good checkpoint is {kept or 'none'}: "
                "free space (or choose another --out) and go on with --resume auto"
            ) from error
        finally:
            if main:
                shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def save_final(self, target: Path) -> Path:
        """Write the model folder: weights, tokenizer, and what it was trained with.

        Every process calls it; a sharded model is gathered.
        """
        partial = target.with_name(f".trainer.{target.name}.partial")
        self.save_model(str(partial), _internal_call=True)
        if self.is_world_process_zero():
            (partial / "training_args.bin").unlink(missing_ok=True)
            write_training_file(partial, self.config.data, self.tokenizer)
            _move(partial, target)
            shutil.rmtree(partial)
        return target

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        assert isinstance(self.model, PreTrainedModel)
        check_dynamics(self.model.config, Path(resume_from_checkpoint))
        check_shapes(self.model, Path(resume_from_checkpoint))
        if self.stream is not None:
            self.stream.load(Path(resume_from_checkpoint))
        super()._load_from_checkpoint(resume_from_checkpoint, model)


def _move(written: Path, target: Path) -> None:
    """Give what Trainer has written its final name, whole or not at all."""
    with atomic_folder(target) as folder:
        for path in written.iterdir():
            path.replace(folder / path.name)


class _Watch(ProgressCallback):
    """The bar, and a look at the losses before anything is logged, measured or saved."""

    def __init__(self, trainer: LMTrainer) -> None:
        super().__init__()
        self.trainer = trainer
        self.first_step, self.begin = 0, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.first_step, self.begin = state.global_step, time.perf_counter()
        self.current_step = state.global_step
        if self.training_bar is not None:
            self.training_bar.set_description("training")
            self.training_bar.update(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if control.should_log or control.should_evaluate or control.should_save:
            loss = self.trainer.stop_if_not_finite()
            if self.training_bar is not None and loss is not None:
                speed = self.tokens_per_second(state)
                self.training_bar.set_postfix(loss=f"{loss:.4f}", tokens_s=f"{speed:.0f}")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Say nothing: the bar carries the loss, the files and the tracker the rest."""

    def tokens_per_second(self, state: TrainerState) -> float:
        """Tokens trained a second since this call of `train` began."""
        config = self.trainer.config
        done = (state.global_step - self.first_step) * config.batch_size * config.data.context
        return done / (time.perf_counter() - self.begin)
