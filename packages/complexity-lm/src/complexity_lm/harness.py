"""lm-eval tasks on a model of ours, through its `HFLM`."""

from pathlib import Path
from typing import Any

from complexity_lm.loading import Loaded
from inl_core.run.errors import UserError


def run_tasks(
    loaded: Loaded, tasks: list[str], batch_size: int, context: int, limit: int | None
) -> dict[str, dict[str, Any]]:
    """Run tasks of lm-eval.

    Args:
        loaded: The model and its tokenizer.
        tasks: Names of lm-eval's own tasks, or paths of task files (YAML); the folder of a file is
            searched for what it includes.
        batch_size: Requests run at once.
        context: Longest window in tokens.
        limit: Documents of each task; None for all.

    Returns:
        For each task its metrics, as lm-eval names them without the filter ("bits_per_byte").

    Raises:
        UserError: lm-eval is not installed, or does not know a task.
    """
    try:
        import lm_eval  # pyright: ignore[reportMissingImports]
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"--tasks needs lm-eval, which cannot be imported ({error}): "
            "pip install 'complexity-lm[eval]'"
        ) from error
    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    for path in files:
        if not path.is_file():
            raise UserError(f"--tasks {path}: there is no such file")
    manager = TaskManager(include_path=sorted({str(path.parent.resolve()) for path in files}))
    names = [_task_name(Path(task)) if Path(task) in files else task for task in tasks]
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise UserError(
            f"lm-eval knows no task {', '.join(unknown)}; see `lm-eval ls tasks`, or give the path "
            "of a task file"
        )

    class RunningText(HFLM):
        """No second separator where lm-eval's rolling windows put one in front themselves."""

        def loglikelihood_rolling(self, *args: Any, **kwargs: Any) -> list[float]:
            before, self.add_bos_token = self.add_bos_token, False
            try:
                return super().loglikelihood_rolling(*args, **kwargs)
            finally:
                self.add_bos_token = before

    model = RunningText(
        pretrained=loaded.model,  # pyright: ignore[reportArgumentType]
        tokenizer=loaded.tokenizer,  # pyright: ignore[reportArgumentType]
        batch_size=batch_size,
        max_length=context,
    )
    found = lm_eval.simple_evaluate(model, tasks=names, task_manager=manager, limit=limit)
    assert found is not None  # only helper processes of a distributed run get none
    return {
        task: {key.removesuffix(",none"): value for key, value in values.items()}
        for task, values in found["results"].items()
    }


def _task_name(path: Path) -> str:
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} is no task file: {error}") from error
    if not isinstance(content, dict) or "task" not in content:
        raise UserError(f"{path} is no task file: it has no key `task`")
    return str(content["task"])
