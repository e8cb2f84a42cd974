"""Who decides a setting of a resumed run: the checkpoint, or the one who resumes it.

Every setting of a training has one owner:

    taken   the new value holds from the checkpoint's step on
    fixed   the checkpoint's value; another one is refused
    free    the new value; weights and loss curve do not depend on it

Settings are nested dictionaries, as `dataclasses.asdict` makes them, and their names are dotted.
"""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from inl_core.run.errors import UserError

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

logger = logging.getLogger(__name__)

Owner = Literal["taken", "fixed", "free"]

_UNSET = object()


def table_of_owners(taken: str, fixed: str, free: str) -> dict[str, Owner]:
    """The owner of each setting, from three lists of names; ValueError for a name given twice."""
    owners: dict[str, Owner] = {}
    lists: dict[Owner, str] = {"taken": taken, "fixed": fixed, "free": free}
    for owner, names in lists.items():
        for name in names.split():
            if name in owners:
                raise ValueError(f"{name} has two owners, {owners[name]} and {owner}")
            owners[name] = owner
    return owners


def take_settings(
    owners: Mapping[str, Owner],
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    checkpoint: Path,
    step: int,
) -> list[dict[str, Any]]:
    """Compare the settings of a resumed run with those of its checkpoint.

    Args:
        owners: The owner of each setting.
        saved: Settings of the run that wrote the checkpoint. Those that it lacks, because it is of
            an older version, are not compared.
        current: Settings of the run that resumes.
        checkpoint: Its folder, for messages.
        step: Its step.

    Returns:
        The settings that change from this step on: one entry ``{"after_step": step, "settings":
        {name: [before, now]}}`` for the history of the run, or none.

    Raises:
        UserError: A fixed setting differs (the message has the options to give), or `steps` is
            less than `step`.
    """
    if current["steps"] < step:
        raise UserError(
            f"steps is {current['steps']}, and {checkpoint} has trained {step} already: give "
            f"--steps {step} or more, or resume from an earlier checkpoint in another --out"
        )
    changed = {
        (name, *key): pair
        for name in owners
        for key, pair in _differences(_value(saved, name), _value(current, name))
    }
    if refused := {".".join(k): pair for k, pair in changed.items() if owners[k[0]] == "fixed"}:
        differences = "; ".join(
            f"{name} is {_text(before)} there and {_text(now)} here"
            for name, (before, now) in refused.items()
        )
        options = " ".join(
            f"no {name}" if before is _UNSET else f"--{name} {shlex.quote(_text(before))}"
            for name, (before, _) in refused.items()
        )
        raise UserError(
            f"{checkpoint} was trained with other settings, which a resumed run cannot change: "
            f"{differences}; give {options}, or start a new run in another --out"
        )
    taken = {
        ".".join(key): [None if value is _UNSET else value for value in pair]
        for key, pair in changed.items()
        if owners[key[0]] == "taken"
    }
    if not taken:
        return []
    logger.warning("from step %d on: %s", step, _describe(taken))
    return [{"after_step": step, "settings": taken}]


def history_comment(changes: Sequence[Mapping[str, Any]]) -> str:
    """The changes of a run as comment lines for its `config.yaml`."""
    return "".join(
        f"# changed after step {change['after_step']}: {_describe(change['settings'])}\n"
        for change in changes
    )


def check_data(
    saved: Mapping[str, Any] | None, current: Mapping[str, Any], checkpoint: Path, otherwise: str
) -> None:
    """Compare the training data of a resumed run with those of its checkpoint.

    Args:
        saved: Fingerprints and counts by name, as the checkpoint has them; None if it was written
            before they were recorded.
        current: The same of the data that were read now.
        checkpoint: Its folder, for messages.
        otherwise: What can be done instead of restoring the data.

    Raises:
        UserError: They differ.
    """
    if saved is None:
        logger.warning(
            "%s does not say which data it was trained on: it cannot be checked that these are "
            "the same", checkpoint,
        )  # fmt: skip
        return
    differences = [
        f"{name} is {_text(saved[name])} there and {_text(value)} here"
        for name, value in current.items()
        if name in saved and saved[name] != value
    ]
    if differences:
        raise UserError(
            f"the data are not those that {checkpoint} was trained on ({'; '.join(differences)}): "
            f"restore the files, or {otherwise}"
        )


@contextmanager
def keeping_settings(optimizer: Optimizer) -> Iterator[None]:
    """Load the state of an optimizer in this block: its own learning rates, betas, ... stay."""
    settings = [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]
    yield
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def move_schedule(scheduler: LRScheduler, step: int) -> None:
    """Set a `LambdaLR`, made for a new run, to where it is after `step` steps."""
    state = scheduler.state_dict()
    rates = [
        base * factor(step)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)  # pyright: ignore[reportAttributeAccessIssue]
    ]
    scheduler.load_state_dict(
        state | {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
    )
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _value(settings: Mapping[str, Any], name: str) -> Any:
    value: Any = settings
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _UNSET
        value = value[part]
    return value


def _differences(before: Any, now: Any) -> Iterator[tuple[tuple[str, ...], tuple[Any, Any]]]:
    """Keys and values at which two settings differ; a setting that the saved ones lack does not."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted({*before, *now}):
            pair = before.get(key, _UNSET), now.get(key, _UNSET)
            if pair[0] != pair[1]:
                yield (key,), pair
    elif before is not _UNSET and before != now:
        yield (), (before, now)


def _describe(changes: Mapping[str, Sequence[Any]]) -> str:
    return ", ".join(
        f"{name} {_text(before)} -> {_text(now)}" for name, (before, now) in changes.items()
    )


def _text(value: Any) -> str:
    if value is _UNSET:
        return "unset"
    return value if isinstance(value, str) else json.dumps(value)
