"""Where curves go beside the CSV files: tensorboard, or another tracker of accelerate by name."""

import importlib.util
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from inl_core.run.errors import UserError

PROJECT = "complexity-dit"


def check_tracker(name: str) -> None:
    """Refuse a tracker that is not installed: accelerate would leave it out in silence.

    Raises:
        UserError: Naming the package.
    """
    if name != "none" and importlib.util.find_spec(name) is None:
        raise UserError(
            f"report_to {name} needs the package {name}, which is not installed: "
            f"pip install {name}, or choose tensorboard or none"
        )


def start_tracker(
    name: str, accelerator: Accelerator, out: Path, settings: dict[str, Any], step: int
) -> None:
    """Begin to report.

    Args:
        name: tensorboard (writes `<out>/logs`), wandb, trackio (both as a run of the project
            complexity-dit named as the folder) or none.
        accelerator: Of the run.
        out: Its folder.
        settings: Its config.
        step: The step that it starts behind; what tensorboard has beyond it is not shown.
    """
    run = {"name": out.name, "config": settings}
    accelerator.init_trackers(
        "logs" if name == "tensorboard" else PROJECT,
        init_kwargs={
            "tensorboard": {"purge_step": step + 1} if step else {},
            "wandb": run | {"dir": str(out)},
            "trackio": run,
        },
    )
