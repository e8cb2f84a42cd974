"""LoRA adapters of the transformer, with label embeddings.

An adapter for a style that the network was not trained on needs a label to select it. So its file
holds, in addition to PEFT's matrices, a row of the label table per new name:

    transformer.blocks.0.attn.to_q.lora_A.weight   (rank, D)   PEFT's, as everywhere in diffusers
    transformer.label_embed.style.Ukiyo_e          (D,)        a row; field and name are in the key

Rows are added and removed with their adapter, and stay when it is merged.
"""

import copy
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote

import torch
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_base import LoraBaseMixin, _fetch_state_dict
from diffusers.utils import get_adapter_name
from torch import Tensor, nn
from torch.nn import functional as F

from complexity_dit import __version__
from complexity_dit.models.loading import add_metadata, warn_of_pickles
from inl_core.run.adapters import checked_settings
from inl_core.run.errors import UserError
from inl_core.run.files import merged_folder

_ROWS = "label_embed."
FETCH_OPTIONS = (
    "weight_name", "use_safetensors", "local_files_only", "cache_dir", "force_download", "proxies",
    "token", "revision", "subfolder",
)  # fmt: skip
"""Keywords of `read_adapter`, as diffusers names them."""


class LabelTables(nn.ModuleDict):
    """Label tables by field, whatever the field is called.

    A name that a module of torch cannot have (`type`, `keys`, "Art. style") is written with percent
    signs in the names of tensors: `label_embed.%74ype.weight`. All others are their own names.
    """

    def __getitem__(self, key: str) -> nn.Module:
        return super().__getitem__(_module_name(key))

    def __setitem__(self, key: str, module: nn.Module) -> None:
        super().__setitem__(_module_name(key), module)

    def __contains__(self, key: str) -> bool:
        return super().__contains__(_module_name(key))

    def __iter__(self) -> Iterator[str]:
        return map(unquote, super().__iter__())

    def keys(self) -> Any:
        return list(self)

    def items(self) -> Any:
        return list(zip(self, self.values(), strict=True))


def _module_name(field: str) -> str:
    """A name that a module can have, for any text; `unquote` is the inverse."""
    first = field[:1] if hasattr(_NO_TABLES, field) else ""
    rest = field.removeprefix(first)
    return _quoted(first) + re.sub(r"\W", lambda found: _quoted(found[0]), rest)


def _quoted(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode())


_NO_TABLES = nn.ModuleDict()


class LabelTable(nn.Module):
    """A label table with the rows of adapters between those of the network and the null row."""

    def __init__(self, own: nn.Embedding) -> None:
        super().__init__()
        self.own = own
        self.added = AddedRows()
        self.names: dict[str, list[str]] = {}

    @property
    def weight(self) -> Tensor:
        """All rows, (names + 1, D)."""
        own = self.own.weight
        return torch.cat([own[:-1], *self.added.values(), own[-1:]])

    @property
    def num_embeddings(self) -> int:
        return self.own.num_embeddings + sum(len(names) for names in self.names.values())

    def forward(self, ids: Tensor) -> Tensor:
        # The own table and the added rows are called, because offloading moves the weights of a
        # module when it is called.
        null, last_own = self.num_embeddings - 1, self.own.num_embeddings - 1
        own = self.own(torch.where(ids == null, last_own, ids.clamp(max=last_own)))
        if not self.names:
            return own
        is_added = (ids >= last_own) & (ids < null)
        added = self.added(torch.where(is_added, ids - last_own, 0))
        return torch.where(is_added[..., None], added, own)


class AddedRows(nn.ParameterDict):
    """Rows by adapter, numbered through all of them."""

    __call__ = nn.Module.__call__  # torch's dictionary refuses to be called

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, torch.cat([*self.values()]))


def read_adapter(source: Any, **fetching: Any) -> tuple[dict, dict | None]:
    """The tensors of an adapter by name, and PEFT's settings.

    `source` is a folder, a safetensors file, a Hub id, or the tensors by name.
    """
    options = dict.fromkeys(FETCH_OPTIONS) | fetching
    if not isinstance(source, dict) and options["use_safetensors"] is False:
        raise UserError("use_safetensors=False would load a pickle; only safetensors here")
    options["use_safetensors"] = True
    try:
        tensors, metadata = _fetch_state_dict(
            source, user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
            allow_pickle=False, **options,
        )  # fmt: skip
    except Exception as error:  # diffusers and safetensors raise types of their own
        message = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"there is no adapter in {source} ({message}): pass a folder with "
            "pytorch_lora_weights.safetensors, or a Hub id and weight_name"
        ) from error
    return dict(tensors), metadata


def without_prefix(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries below `prefix.`, without it."""
    head = f"{prefix}."
    return {k.removeprefix(head): v for k, v in values.items() if k.startswith(head)}


def label_rows(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The label rows in an adapter's tensors, `{field: {name: (D,)}}`."""
    rows: dict[str, dict[str, Tensor]] = {}
    for key, row in tensors.items():
        if key.startswith(_ROWS):
            field, _, name = key.removeprefix(_ROWS).partition(".")
            rows.setdefault(unquote(field), {})[name] = row
    return rows


class LabelAdapterMixin(PeftAdapterMixin):
    """The adapter methods of diffusers, extended to the label rows of a network's `label_embed`."""

    label_embed: LabelTables
    config: Any

    @property
    def added_labels(self) -> dict[str, list[str]]:
        """Names added by adapters, by field, in the order of their ids."""
        return {
            field: [name for names in table.names.values() for name in names]
            for field, table in self.label_tables().items()
        }

    @torch.no_grad()
    def add_labels(
        self,
        labels: Mapping[str, Sequence[str] | Mapping[str, Tensor]],
        adapter_name: str = "default",
    ) -> None:
        """Add label rows to an adapter.

        Args:
            labels: Per field, either names, whose rows start as copies of the null row, or names
                with their rows, (D,).
            adapter_name: The adapter they belong to.

        Raises:
            UserError: For a field that the network does not have, a name that another adapter
                added, or a row of another width.
        """
        present = self.added_labels
        for field, names in labels.items():
            if field not in self.label_embed:
                raise UserError(
                    f"the adapter has labels of the field {field!r}; the network has "
                    f"{', '.join(self.label_embed) or 'no label fields'}"
                )
            for name in names:
                if name in present.get(field, ()):
                    raise UserError(
                        f"{field} {name!r} was added by another adapter already: unload that one"
                    )
            table = self.label_embed[field]
            null = table.weight[-1].detach()
            rows = [names[n] if isinstance(names, Mapping) else null for n in names]
            wrong = [tuple(row.shape) for row in rows if row.shape != null.shape]
            if wrong:
                raise UserError(
                    f"the adapter's labels are of shape {wrong[0]} and the network's of "
                    f"{tuple(null.shape)}: it was trained on another network"
                )
            if not isinstance(table, LabelTable):
                table = self.label_embed[field] = LabelTable(table)
            table.added[adapter_name] = nn.Parameter(torch.stack(rows).to(null))
            table.names[adapter_name] = list(names)

    def adapter_state_dict(self, adapter_name: str = "default") -> dict[str, Tensor]:
        """An adapter's tensors as saved, without prefix."""
        from peft.utils import get_peft_model_state_dict

        tensors = get_peft_model_state_dict(self, adapter_name=adapter_name)
        for field, table in self.label_tables().items():
            if adapter_name in table.names:
                rows = table.added[adapter_name].detach().unbind()
                names = zip(table.names[adapter_name], rows, strict=True)
                head = f"{_ROWS}{_module_name(field)}."
                tensors |= {f"{head}{name}": row.clone() for name, row in names}
        return tensors

    def adapter_settings(self, adapter_name: str = "default") -> dict[str, Any]:
        """An adapter's PEFT settings as saved, with sets as sorted lists."""
        settings = self.peft_config[adapter_name].to_dict()
        return {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()}

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        prefix: str | None = "transformer",
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """As in diffusers; new labels of the adapter get rows after those of the network.

        Raises:
            UserError: If the adapter does not exist or was trained on another network. Other
                errors of PEFT and diffusers are raised unchanged, and a prefix that no tensor has
                is logged.
        """
        fetching = {name: kwargs.pop(name) for name in FETCH_OPTIONS if name in kwargs}
        tensors, metadata = read_adapter(pretrained_model_name_or_path_or_dict, **fetching)
        if prefix is not None:
            tensors = without_prefix(tensors, prefix)
            metadata = None if metadata is None else without_prefix(metadata, prefix)
        metadata = kwargs.pop("metadata", None) or metadata
        rows = label_rows(tensors)
        matrices = {k: v for k, v in tensors.items() if not k.startswith(_ROWS)}
        if not matrices:  # diffusers logs that no tensor has the prefix
            return super().load_lora_adapter({}, prefix=prefix, **kwargs)
        metadata = checked_settings(metadata, matrices, self)
        if hotswap and rows:
            raise UserError("an adapter with labels cannot be hot-swapped: unload the other first")
        name = kwargs.pop("adapter_name", None) or get_adapter_name(self)
        try:
            super().load_lora_adapter(
                matrices, prefix=None, hotswap=hotswap, adapter_name=name, metadata=metadata,
                **kwargs,
            )  # fmt: skip
        except Exception as error:  # of any type: nothing of the adapter may stay
            self._drop_empty_layers()
            if "size mismatch" not in str(error):
                raise
            raise UserError(
                f"the adapter does not fit this network: {str(error).strip().splitlines()[-1]}"
            ) from error
        try:
            self.add_labels(rows, name)
        except UserError:
            self.delete_adapters(name)
            raise

    def save_lora_adapter(
        self, save_directory: Any, adapter_name: str = "default", **kwargs: Any
    ) -> None:
        """As in diffusers, with the adapter's labels; to load it, pass `prefix=None`."""
        present = getattr(self, "peft_config", {})
        if adapter_name not in present:
            raise UserError(
                f"Adapter name {adapter_name} not found in the model. It has: "
                f"{', '.join(present) or 'none'}"
            )
        if not kwargs.pop("safe_serialization", True):
            warn_of_pickles()
        with merged_folder(Path(save_directory)) as folder:
            LoraBaseMixin.write_lora_layers(
                self.adapter_state_dict(adapter_name), str(folder), True,
                kwargs.get("weight_name"), None, True, self.adapter_settings(adapter_name),
            )  # fmt: skip

    def unload_lora(self) -> None:
        """Remove all adapters; labels of merged ones stay, as their matrices do."""
        merged = {name for layer in self._tuned_layers() for name in layer.merged_adapters}
        super().unload_lora()
        for table in self.label_tables().values():
            self._drop_rows([name for name in table.names if name not in merged])

    def unfuse_lora(self) -> None:
        """As in diffusers; the scale that `fuse_lora` was given is undone too."""
        super().unfuse_lora()
        self.undo_scale()

    def undo_scale(self) -> None:
        """Give adapters the strength that they had before `fuse_lora` multiplied it."""
        scale, self.lora_scale = getattr(self, "lora_scale", 1.0), 1.0
        if scale not in (0.0, 1.0):
            for layer in self._tuned_layers():
                layer.unscale_layer(scale)

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """As in diffusers; the labels of the adapters are removed too."""
        super().delete_adapters(adapter_names)
        self._drop_empty_layers()
        self._drop_rows([adapter_names] if isinstance(adapter_names, str) else adapter_names)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        save_function: Any = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        **kwargs: Any,
    ) -> None:
        """As in diffusers; labels of merged adapters become those of the network.

        The header of the weights gets the class, its config and the version, so that a file can be
        identified without its `config.json`.

        Raises:
            UserError: If an adapter is loaded: the folder would hold only half of it.
        """
        if any(True for _ in self._tuned_layers()):
            raise UserError(
                "an adapter is loaded: merge it first (fuse_lora, then unload_lora_weights), or "
                "save the adapter alone (save_lora_adapter)"
            )
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        with self._plain_tables(), merged_folder(Path(save_directory)) as folder:
            # Named parameters, because a pipeline passes only what is in the signature.
            super().save_pretrained(  # pyright: ignore
                folder, is_main_process, save_function, safe_serialization, variant,
                max_shard_size, **kwargs,
            )  # fmt: skip
            # Without `_name_or_path`, the path it was loaded from.
            config = {k: v for k, v in self.config.items() if not k.startswith("_")}
            about = {
                "complexity_dit.class": type(self).__name__,
                "complexity_dit.version": __version__,
                "complexity_dit.config": json.dumps(config, sort_keys=True),
            }
            for file in sorted(folder.glob("*.safetensors")):
                add_metadata(file, about)

    @contextmanager
    def _plain_tables(self) -> Iterator[None]:
        """Make the labels of adapters those of the network, in tables and config."""
        tables, counts = self.label_tables(), list(self.config.num_classes)
        try:
            for field, table in tables.items():
                self.label_embed[field] = nn.Embedding.from_pretrained(table.weight.detach())
            rows = [len(cast(nn.Embedding, t).weight) - 1 for t in self.label_embed.values()]
            self.register_to_config(num_classes=rows)  # pyright: ignore
            yield
        finally:
            for field, table in tables.items():
                self.label_embed[field] = table
            self.register_to_config(num_classes=counts)  # pyright: ignore

    def label_tables(self) -> dict[str, LabelTable]:
        """The tables with rows of adapters, by field."""
        return {f: t for f, t in self.label_embed.items() if isinstance(t, LabelTable)}

    def _tuned_layers(self) -> Iterator[Any]:
        if not getattr(self, "peft_config", None):
            return
        from peft.tuners.tuners_utils import BaseTunerLayer

        for module in self.modules():  # pyright: ignore
            if isinstance(module, BaseTunerLayer):
                yield module

    def _drop_empty_layers(self) -> None:
        """Unwrap the layers if no adapter is left; PEFT's wrappers would rename the tensors."""
        if not getattr(self, "peft_config", None):
            super().unload_lora()

    def _drop_rows(self, adapter_names: Sequence[str]) -> None:
        for field, table in self.label_tables().items():
            for name in adapter_names:
                if name in table.names:
                    del table.names[name], table.added[name]
            if not table.names:
                self.label_embed[field] = table.own


def blank_copy(model: Any) -> Any:
    """A newly initialised network of the same structure, adapters included."""
    blank = type(model).from_config(model.config)
    for name, settings in (getattr(model, "peft_config", None) or {}).items():
        blank.add_adapter(copy.deepcopy(settings), name)
        for field, table in model.label_tables().items():
            blank.add_labels({field: table.names[name]}, name)
    return blank
