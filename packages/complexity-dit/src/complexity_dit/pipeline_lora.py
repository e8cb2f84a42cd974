"""Adapters at the level of the pipeline: loaded, merged and unloaded as in diffusers.

The new labels of an adapter are asked for by name as soon as it is loaded; see `adapters`.
"""

from typing import Any, ClassVar

from diffusers.loaders.lora_base import LoraBaseMixin

from complexity_dit.adapters import label_rows, read_adapter
from complexity_dit.transformer import ComplexityDiTTransformer2DModel
from inl_core.run.errors import UserError


class LoraMixin(LoraBaseMixin):
    """`load_lora_weights` and what goes with it. Needs `transformer` and `label_names`."""

    _lora_loadable_modules: ClassVar[list[str]] = ["transformer"]
    transformer_name = "transformer"
    transformer: ComplexityDiTTransformer2DModel
    label_names: dict[str, list[str]]

    @classmethod
    def lora_state_dict(cls, source: Any, **kwargs: Any) -> Any:  # pyright: ignore
        """An adapter's tensors by name; with `return_lora_metadata`, PEFT's settings too."""
        both = kwargs.pop("return_lora_metadata", False)
        tensors, metadata = read_adapter(source, None, **kwargs)
        return (tensors, metadata) if both else tensors

    def load_lora_weights(  # pyright: ignore
        self, source: Any, adapter_name: str | None = None, **kwargs: Any
    ) -> None:
        """Load an adapter; its new labels can then be asked for by name.

        Args:
            source: A folder, a safetensors file, a Hub id, or tensors by name.
            adapter_name: What to call it, for `set_adapters`, `fuse_lora` and `delete_adapters`.
            **kwargs: As for `load_lora_adapter` of the transformer.

        Raises:
            UserError: If there is no such adapter, it is one of another network, or it brings a
                label that the pipeline has.
        """
        fetching = {k: v for k, v in kwargs.items() if k in ("weight_name", "subfolder", "revision",
                    "token", "cache_dir", "local_files_only", "force_download", "proxies",
                    "use_safetensors")}  # fmt: skip
        tensors, metadata = read_adapter(source, None, **fetching)
        prefix = self.transformer_name
        for field, rows in label_rows(read_adapter(tensors, prefix)[0]).items():
            for name in rows:
                if name in self.label_names.get(field, ()):
                    raise UserError(
                        f"the adapter brings {field} {name!r}, which this pipeline has: load it "
                        "into the pipeline it was trained on"
                    )
        if metadata is not None:
            head = f"{prefix}."
            metadata = {k.removeprefix(head): v for k, v in metadata.items() if k.startswith(head)}
        rest = {k: v for k, v in kwargs.items() if k not in fetching}
        self.transformer.load_lora_adapter(
            tensors, prefix=prefix, adapter_name=adapter_name, metadata=metadata, _pipeline=self,
            **rest,
        )  # fmt: skip

    @classmethod
    def save_lora_weights(  # pyright: ignore
        cls,
        save_directory: Any,
        transformer_lora_layers: dict,
        transformer_lora_adapter_metadata: dict | None = None,
        weight_name: str | None = None,
        is_main_process: bool = True,
        save_function: Any = None,
        safe_serialization: bool = True,
    ) -> None:
        """Write an adapter folder: `transformer.adapter_state_dict()` are the layers."""
        if not safe_serialization:
            raise UserError("safe_serialization=False would write a pickle; only safetensors here")
        cls._save_lora_weights(
            save_directory, {cls.transformer_name: transformer_lora_layers},
            {cls.transformer_name: transformer_lora_adapter_metadata}, is_main_process,
            weight_name, save_function,  # pyright: ignore
        )  # fmt: skip

    def fuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Merge adapters into the weights (`lora_scale`, `safe_fusing`, `adapter_names`)."""
        super().fuse_lora(components or self._lora_loadable_modules, **kwargs)

    def unfuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Undo `fuse_lora`, while the adapters are loaded."""
        super().unfuse_lora(components or self._lora_loadable_modules, **kwargs)
