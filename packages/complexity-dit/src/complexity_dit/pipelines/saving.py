"""Pipeline folders that `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` loads.

diffusers does not import a third-party package because a folder names it. So a folder gets one-line
modules that import our classes, and `model_index.json` names those modules.
"""

import json
import os
import sys
import tempfile
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from diffusers import ModelMixin, SchedulerMixin
from PIL import Image

from complexity_dit.hub import check_reachable, upload
from complexity_dit.models.autoencoder import TinyAutoencoder
from complexity_dit.models.loading import only_safetensors
from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel
from complexity_dit.pipelines.model_card import write_card
from inl_core.run.errors import UserError
from inl_core.run.json_files import fits

_PIPELINE_SHIM = "pipeline_complexity_dit"
# Our classes among the components: diffusers does not know them, so a module of this name beside
# their weights imports them.
_SHIMS: dict[str, tuple[str, type]] = {
    "transformer": ("modeling_complexity_dit", ComplexityDiTTransformer2DModel),
    "vae": ("modeling_tiny_autoencoder", TinyAutoencoder),
}
_SETTINGS = frozenset({"id2label", "latents_mean", "latents_std"})
# Components that a caller of `from_pretrained` brings: what a folder says of them is not read.
_given: ContextVar[frozenset[str]] = ContextVar("_given", default=frozenset())

_HUB_ARGUMENTS = ("repo_id", "private", "token", "commit_message", "create_pr")


def _check_components(config: dict[str, Any], given: frozenset[str]) -> None:
    """Refuse classes that are not known: importing a module by name runs its code."""
    for name, value in config.items():
        if name.startswith("_") or name in _SETTINGS or name in given or value == [None, None]:
            continue
        if name not in ("transformer", "scheduler", "vae"):
            raise UserError(f"model_index.json names a component {name!r}, which we do not have")
        if not fits(value, list[str]) or len(value) != 2:
            raise UserError(f"model_index.json has {name} {value!r}; expected [library, class]")
        module, kind = value
        if name in _SHIMS and value == [_SHIMS[name][1].__module__, _SHIMS[name][1].__name__]:
            continue
        base = SchedulerMixin if name == "scheduler" else ModelMixin
        # What the caller has imported is known: it runs nothing to look it up there.
        known = getattr(sys.modules.get(module), kind, None)
        if not (isinstance(known, type) and issubclass(known, base)):
            raise UserError(
                f"model_index.json names {module}.{kind} as the {name}; expected one of this "
                f"package or a {base.__name__.removesuffix('Mixin').lower()} of diffusers. "
                "It was not imported; if you trust it, import it before you load the folder"
            )


class FilesMixin:
    """Saving and loading; stands before `DiffusionPipeline` among a pipeline's bases."""

    config_name: str

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Read `model_index.json`, pointing at the installed classes instead of the shims.

        Loading through a class of ours needs no code from the folder, so none is run and no
        `trust_remote_code` is asked for; and each of our pipelines loads the folder of any other.
        """
        loaded = super().load_config(*args, **kwargs)  # pyright: ignore
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        name = config.get("_class_name")
        if isinstance(name, list) and name[:1] == [_PIPELINE_SHIM]:
            config["_class_name"] = cls.__name__
        for component, (shim, model) in _SHIMS.items():
            if config.get(component) == [shim, model.__name__]:
                config[component] = [model.__module__, model.__name__]
        _check_components(config, _given.get())
        return loaded

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in diffusers, from safetensors alone, and of classes that are known.

        Raises:
            UserError: The folder has pickles in place of safetensors, or `model_index.json` names
                a class that is neither this package's, nor a model or scheduler of diffusers, nor
                one that you have imported.
        """
        only_safetensors(kwargs)
        token = _given.set(frozenset(kwargs))
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # pyright: ignore
        finally:
            _given.reset(token)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        push_to_hub: bool = False,
        result: dict[str, Any] | Path | None = None,
        grid: Image.Image | Path | None = None,
        **kwargs: Any,
    ) -> None:
        """Save as a folder that `DiffusionPipeline.from_pretrained` can load.

        Besides what diffusers writes, the folder gets one-line modules that import the classes of
        this package (pipeline, transformer, and a `TinyAutoencoder`); `model_index.json` names
        them, because diffusers does not import a third-party package on its own. And a model card,
        README.md, unless there is one that was edited.

        Args:
            save_directory: The folder.
            safe_serialization: Must be True; weights are safetensors only.
            push_to_hub: Also upload the folder (`repo_id`, `private`, `token`, `commit_message`,
                `create_pr`).
            result: For the card: what `complexity-dit evaluate` wrote, or its result.json.
            grid: For the card: a picture of samples, or its file.
            **kwargs: Further arguments of `DiffusionPipeline.save_pretrained`, e.g. `variant`.

        Raises:
            UserError: For pickles, an adapter that is loaded and not merged, or an upload that the
                Hub refuses or that cannot reach it.
        """
        if not safe_serialization:
            raise UserError("safe_serialization=False would write a pickle; only safetensors here")
        hub = {k: kwargs.pop(k) for k in _HUB_ARGUMENTS if k in kwargs}
        super().save_pretrained(save_directory, **kwargs)  # pyright: ignore
        folder = Path(save_directory)
        index_path = folder / self.config_name
        index = json.loads(index_path.read_text())
        index["_class_name"] = [_PIPELINE_SHIM, type(self).__name__]
        index["id2label"] = self.id2label  # with the names of merged adapters
        shims: list[tuple[Path, type]] = [(folder / f"{_PIPELINE_SHIM}.py", type(self))]
        for component, (shim, cls) in _SHIMS.items():
            if isinstance(getattr(self, component), cls):
                index[component] = [shim, cls.__name__]
                shims.append((folder / component / f"{shim}.py", cls))
        for path, cls in shims:
            path.write_text(f"from complexity_dit import {cls.__name__}  # noqa: F401\n")
        index_path.write_text(json.dumps(index, indent=2) + "\n")
        write_card(folder, result, grid, hub.get("repo_id"))
        if push_to_hub:
            upload(folder, f"Upload {type(self).__name__}", **hub)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:  # pyright: ignore
        """Upload to the Hub what `save_pretrained` writes, its card included.

        Args:
            repo_id: "user/name", or a name of your own.
            **kwargs: As for `save_pretrained`.

        Returns:
            Where it is.

        Raises:
            UserError: As `save_pretrained`.
        """
        hub = {k: kwargs.pop(k) for k in _HUB_ARGUMENTS if k in kwargs}
        check_reachable(repo_id)  # before anything is written
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, repo_id.split("/")[-1])
            self.save_pretrained(folder, repo_id=repo_id, **kwargs)
            return upload(folder, f"Upload {type(self).__name__}", repo_id=repo_id, **hub)
