"""Pipeline folders that `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` loads.

diffusers does not import a third-party package because a folder names it. So each folder has
one-line modules that import the classes of this package, and `model_index.json` names these.
"""

import json
import os
import shutil
import sys
import tempfile
from contextvars import ContextVar
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
from diffusers import ModelMixin
from PIL import Image
from torch import nn

from complexity_dit.config import AVERAGE_FILE, DATA_FILE
from complexity_dit.models.autoencoder import TinyAutoencoder
from complexity_dit.models.loading import only_safetensors, warn_of_pickles
from complexity_dit.models.text import check_text_weights, optional_package
from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel
from complexity_dit.pipelines.model_card import CARD_FILE, GRID_FILE, write_card
from inl_core.run.errors import UserError
from inl_core.run.files import (
    finish_merge,
    merged_folder,
    refuse_strange_files,
)
from inl_core.run.hub import check_reachable, upload
from inl_core.run.json_files import fits, read_json_object
from inl_core.run.weights import weights_fit

_PIPELINE_MODULE = "pipeline_complexity_dit"
# Component: (module written next to its weights, class that the module imports).
_COMPONENT_MODULES: dict[str, tuple[str, type]] = {
    "transformer": (ComplexityDiTTransformer2DModel.shim, ComplexityDiTTransformer2DModel),
    "vae": (TinyAutoencoder.shim, TinyAutoencoder),
}
# Of a text encoder that is a complexity-lm model, a package which others do not need.
_TEXT_MODULE, _TEXT_CLASS = "modeling_complexity_lm", "DeepModel"
_BASES = {
    "transformer": "ModelMixin", "vae": "ModelMixin", "scheduler": "SchedulerMixin",
    "text_encoder": "PreTrainedModel", "tokenizer": "PreTrainedTokenizerBase",
}  # fmt: skip
_KINDS = {
    "ModelMixin": "model", "SchedulerMixin": "scheduler", "PreTrainedModel": "model",
    "PreTrainedTokenizerBase": "tokenizer",
}  # fmt: skip
SETTINGS = frozenset({
    "id2label", "latents_mean", "latents_std", "objective", "label_counts", "prompt_length",
    "guidance",
})  # fmt: skip
"""What a pipeline has in `model_index.json` beside its components."""
_HUB_ARGUMENTS = ("repo_id", "private", "token", "commit_message", "create_pr")
# Components passed to `from_pretrained`: their entries in `model_index.json` are not used.
_passed: ContextVar[frozenset[str]] = ContextVar("_passed", default=frozenset())


def _check_components(config: dict[str, Any], passed: frozenset[str]) -> None:
    """Refuse classes that are not imported yet: importing a module by name runs its code."""
    for name, value in config.items():
        if name.startswith("_") or name in SETTINGS | passed or value == [None, None]:
            continue
        if name not in _BASES:
            raise UserError(f"model_index.json names a component {name!r}; expected {list(_BASES)}")
        if not fits(value, list[str]) or len(value) != 2:
            raise UserError(f"model_index.json has {name} {value!r}; expected [library, class]")
        module, class_name = value
        library = "transformers" if name in ("text_encoder", "tokenizer") else "diffusers"
        base = getattr(optional_package(library, f"the {name} of this pipeline"), _BASES[name])
        cls = getattr(sys.modules.get(module), class_name, None)
        if not (isinstance(cls, type) and issubclass(cls, base)):
            raise UserError(
                f"model_index.json names {module}.{class_name} as the {name}; expected one of this "
                f"package or a {_KINDS[_BASES[name]]} of {library}. "
                "It was not imported; if you trust it, import it before you load the folder"
            )


def _check_vae(folder: Path) -> None:
    """Refuse a VAE with more layers than its weights: diffusers would build it before it loads."""
    path = folder / "config.json"
    if not path.is_file():
        return
    try:
        name = read_json_object(path).get("_class_name")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    cls = (
        TinyAutoencoder if name == TinyAutoencoder.__name__ else getattr(diffusers, str(name), None)
    )
    if isinstance(cls, type) and issubclass(cls, ModelMixin):
        weights_fit(folder, cls.from_config)  # pyright: ignore -- with ConfigMixin, as all have


def _check_text_encoder(folder: Path, config: dict[str, Any]) -> None:
    """Refuse a text encoder whose weights do not fill it: transformers would draw the rest."""
    library, name = config.get("text_encoder") or (None, None)
    path = folder / "text_encoder"
    if library is not None and path.is_dir():
        check_text_weights(path, getattr(sys.modules[library], name))


def _name_installed_classes(config: dict[str, Any], text_encoder: bool) -> None:
    """Replace the one-line modules of a folder by the installed modules that they import."""
    for component, (module, model) in _COMPONENT_MODULES.items():
        if config.get(component) == [module, model.__name__]:
            config[component] = [model.__module__, model.__name__]
    if text_encoder and config.get("text_encoder") == [_TEXT_MODULE, _TEXT_CLASS]:
        lm = optional_package("complexity_lm.modeling_complexity", "the text encoder")
        config["text_encoder"] = [lm.__name__, _TEXT_CLASS]


class FilesMixin:
    """Saving and loading; must precede `DiffusionPipeline` in the bases of a pipeline."""

    config_name: str

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Read `model_index.json`, with the one-line modules replaced by the installed classes.

        So no code of the folder is run, `trust_remote_code` is not needed, and each pipeline of
        this package loads the folders of the others.
        """
        loaded = super().load_config(*args, **kwargs)  # pyright: ignore
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        name = config.get("_class_name")
        if isinstance(name, list) and name[:1] == [_PIPELINE_MODULE]:
            config["_class_name"] = cls.__name__
        passed = _passed.get()
        if "text_encoder" in passed and config.get("text_encoder") == [_TEXT_MODULE, _TEXT_CLASS]:
            config["text_encoder"] = [None, None]  # then the package need not be there
        _name_installed_classes(config, text_encoder=True)
        _check_components(config, passed)
        return loaded

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in diffusers, which asks the class of the pipeline for the components of a folder.

        `DiffusionPipeline` has read the folder itself then. For ``device_map="balanced"`` it builds
        the components once more to learn their sizes, and forgets `trust_remote_code` there.
        """
        config_dict = dict(config_dict)
        _name_installed_classes(config_dict, text_encoder=find_spec("complexity_lm") is not None)
        return super().extract_init_dict(config_dict, **kwargs)  # pyright: ignore

    @classmethod
    def download(cls, *args: Any, **kwargs: Any) -> str:
        """As in diffusers, which calls this for a Hub id; then looks at the files of it."""
        folder = super().download(*args, **kwargs)  # pyright: ignore
        refuse_strange_files(Path(folder))
        cls._check_parts(Path(folder), _passed.get())
        return folder

    @classmethod
    def _check_parts(cls, folder: Path, passed: frozenset[str]) -> None:
        """Look at the networks of a folder that neither diffusers nor transformers would check."""
        if "vae" not in passed:
            _check_vae(folder / "vae")
        if "text_encoder" not in passed and (folder / "text_encoder").is_dir():
            token = _passed.set(passed)
            try:
                _check_text_encoder(folder, cls.load_config(folder))
            finally:
                _passed.reset(token)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in diffusers, from safetensors only, with all tensors, and of known classes only.

        Raises:
            UserError: If the folder has pickles in place of safetensors, weights do not fit their
                config, or `model_index.json` names a class that is neither of this package, nor of
                diffusers or transformers, nor imported already; or if a `scheduler` that was passed
                cannot sample from the model.
        """
        only_safetensors(kwargs)
        finish_merge(Path(pretrained_model_name_or_path))
        refuse_strange_files(Path(pretrained_model_name_or_path))
        # Assigned below, to the objective of the folder's own scheduler.
        scheduler = kwargs.pop("scheduler", None)
        cls._check_parts(Path(pretrained_model_name_or_path), frozenset(kwargs))
        token = _passed.set(frozenset(kwargs))
        try:
            loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # pyright: ignore
        finally:
            _passed.reset(token)
        # The VAEs of diffusers are loaded without `load_weights`: tensors that are not in the file
        # stay on the meta device (as those do that a device map moves to the disk).
        vae = None if "device_map" in kwargs else loaded.components["vae"]
        for name, tensor in vae.state_dict().items() if isinstance(vae, nn.Module) else ():
            if tensor.is_meta:
                raise UserError(f"the vae lacks the tensor {name} of its config.json")
        if scheduler is not None:
            loaded.scheduler = scheduler
        return loaded

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

        In addition to what diffusers writes, the folder gets one-line modules that import the
        classes of this package (pipeline, transformer, a `TinyAutoencoder`, and a text encoder of
        complexity-lm), named in `model_index.json`, and a model card, README.md, unless there is an
        edited one.

        Args:
            save_directory: The folder.
            safe_serialization: False warns; weights are safetensors only.
            push_to_hub: Also upload the folder (`repo_id`, `private`, `token`, `commit_message`,
                `create_pr`).
            result: For the card: a result of `complexity-dit evaluate`, or its result.json.
            grid: For the card: an image of samples, or its file.
            **kwargs: Further arguments of `DiffusionPipeline.save_pretrained`, e.g. `variant`.

        Raises:
            UserError: If an adapter is loaded and not merged, or the Hub refuses the upload or
                cannot be reached.
        """
        if not safe_serialization:
            warn_of_pickles()
        hub = {k: kwargs.pop(k) for k in _HUB_ARGUMENTS if k in kwargs}
        target = Path(save_directory)
        with merged_folder(target) as folder:
            for read in (CARD_FILE, GRID_FILE, DATA_FILE, AVERAGE_FILE):  # by `write_card`
                if (target / read).is_file():
                    shutil.copy(target / read, folder)
            self._write(folder, **kwargs)
            write_card(folder, result, grid, hub.get("repo_id"))
        if push_to_hub:
            upload(target, f"Upload {type(self).__name__}", **hub)

    def _write(self, folder: Path, **kwargs: Any) -> None:
        super().save_pretrained(folder, **kwargs)  # pyright: ignore
        index_path = folder / self.config_name
        index = json.loads(index_path.read_text())
        index["_class_name"] = [_PIPELINE_MODULE, type(self).__name__]
        index["id2label"] = self.id2label  # with the names of merged adapters
        modules: list[tuple[Path, type]] = [(folder / f"{_PIPELINE_MODULE}.py", type(self))]
        for component, (module, cls) in _COMPONENT_MODULES.items():
            if isinstance(getattr(self, component), cls):
                index[component] = [module, cls.__name__]
                modules.append((folder / component / f"{module}.py", cls))
        encoder = type(self.text_encoder)
        if (encoder.__module__, encoder.__name__) == (
            "complexity_lm.modeling_complexity",
            _TEXT_CLASS,
        ):
            index["text_encoder"] = [_TEXT_MODULE, _TEXT_CLASS]
            shim = f"from complexity_lm import {_TEXT_CLASS}  # noqa: F401\n"
            (folder / "text_encoder" / f"{_TEXT_MODULE}.py").write_text(shim)
        for path, cls in modules:
            path.write_text(f"from complexity_dit import {cls.__name__}  # noqa: F401\n")
        index_path.write_text(json.dumps(index, indent=2) + "\n")
        for path in (index_path, *folder.glob("*/config.json")):
            config = json.loads(path.read_text())
            config.pop("_name_or_path", None)  # where it was loaded from on this machine
            if "dtype" in config:  # of transformers, which loads in it; diffusers loads in float32
                config["dtype"] = "float32"
            path.write_text(json.dumps(config, indent=2) + "\n")

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:  # pyright: ignore
        """Upload what `save_pretrained` writes, including the model card, to the Hub.

        Args:
            repo_id: "user/name", or a name in your own namespace.
            **kwargs: As for `save_pretrained`.

        Returns:
            The address of the upload.

        Raises:
            UserError: As `save_pretrained`.
        """
        hub = {k: kwargs.pop(k) for k in _HUB_ARGUMENTS if k in kwargs}
        check_reachable(repo_id)  # before anything is written
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, repo_id.split("/")[-1])
            self.save_pretrained(folder, repo_id=repo_id, **kwargs)
            return upload(folder, f"Upload {type(self).__name__}", repo_id=repo_id, **hub)
