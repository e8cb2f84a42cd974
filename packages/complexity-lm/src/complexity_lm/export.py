"""`complexity-lm export`: a model as one file for programs that do not run PyTorch."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerFast

from complexity_lm.configuration_complexity import DeepConfig
from complexity_lm.loading import Loaded, load
from inl_core.run.errors import UserError
from inl_core.run.files import atomic_file

OutType = Literal["f32", "f16", "bf16", "q8_0"]

_WHY = "docs/how-to/gguf.md says why, and what to use instead"
_GPT2_PIECES = {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}


def export_gguf(name: str, out: str, outtype: OutType = "f32") -> Path:
    """Write a model without dynamics and experts as a GGUF file of the architecture ``qwen3``.

    That is the plain transformer of this package (`dynamics_placement="none"`, `num_experts=0`):
    llama.cpp computes the same. The tokenizer and its chat template are in the file.

    Args:
        name: A model folder, a run's folder, a checkpoint or a Hub id.
        out: The file, which must not exist.
        outtype: Type of the matrices; vectors stay in fp32.

    Returns:
        The file.

    Raises:
        UserError: llama.cpp has no architecture or tokenizer like this one, or the file exists.
    """
    if find_spec("gguf") is None:
        raise UserError("GGUF files need the package gguf: pip install 'complexity-lm[gguf]'")
    target = Path(out)
    if target.exists():
        raise UserError(f"{target} exists: choose another --out")
    loaded = load(name, device="cpu")
    check_architecture(loaded)
    pieces = _pieces(loaded.tokenizer)
    with atomic_file(target) as partial:
        _write(partial, loaded, pieces, outtype)
    return target


def check_architecture(loaded: Loaded) -> None:
    """Check that llama.cpp computes what a model does.

    Raises:
        UserError: It does not; names every setting that it lacks.
    """
    config = loaded.model.config
    if not isinstance(config, DeepConfig):
        raise UserError(
            f"{loaded.name} is a {config.model_type}; llama.cpp's convert_hf_to_gguf.py exports it "
            "if llama.cpp has it"
        )
    if getattr(loaded.model, "peft_config", None):
        raise UserError(
            f"{loaded.name} is an adapter: merge it into its model first (peft's "
            "merge_and_unload), and save that"
        )
    rope: Any = config.rope_parameters
    settings = {
        f"dynamics_placement {config.dynamics_placement!r}": config.dynamics_placement != "none",
        f"num_experts {config.num_experts}": config.num_experts > 0,
        f"num_loops {config.num_loops}": config.loop_start is not None,
        f"sliding_window {config.sliding_window}": config.sliding_window is not None,
        "use_bidirectional_attention": config.use_bidirectional_attention,
        f"rope_type {rope['rope_type']!r}": rope["rope_type"] != "default",
    }
    if missing := [name for name, differs in settings.items() if differs]:
        raise UserError(f"llama.cpp cannot run {', '.join(missing)}: {_WHY}")


def _pieces(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The parts of a byte-level BPE that cuts text as GPT-2 does, as this package trains it.

    Raises:
        UserError: It is another kind, whose pieces llama.cpp would cut otherwise.
    """
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    cut = core["pre_tokenizer"] or {}
    is_gpt2 = core["normalizer"] is None and all(cut.get(k) == v for k, v in _GPT2_PIECES.items())
    if core["model"]["type"] != "BPE" or not is_gpt2:
        raise UserError(
            f"the tokenizer is not a byte-level BPE in GPT-2's form, as complexity-lm tokenizer "
            f"trains it: {_WHY}"
        )
    return core


def _write(path: Path, loaded: Loaded, core: dict[str, Any], outtype: OutType) -> None:
    import gguf  # pyright: ignore[reportMissingImports] (an extra)

    config, tokenizer = loaded.model.config, loaded.tokenizer
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_name(Path(loaded.name).name)
    writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES[outtype]))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)

    special = {one["id"]: one["content"] for one in core["added_tokens"]}
    tokens = {i: token for token, i in core["model"]["vocab"].items()} | special
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    # llama.cpp wants a token for every row of the embedding.
    rows = range(config.vocab_size)
    writer.add_token_list([tokens.get(i, f"[PAD{i}]") for i in rows])
    writer.add_token_types(
        [
            kinds.CONTROL if i in special else kinds.NORMAL if i in tokens else kinds.UNUSED
            for i in rows
        ]
    )
    writer.add_token_merges([" ".join(pair) for pair in core["model"]["merges"]])
    for name in ("bos", "eos", "pad"):
        if (token := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)
    if template := tokenizer.chat_template:
        if isinstance(template, dict):  # several, by name
            template = [{"name": name, "template": text} for name, text in template.items()]
        writer.add_chat_template(template)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.num_hidden_layers)
    matrices = gguf.GGMLQuantizationType[outtype.upper()]
    for name, parameter in loaded.model.named_parameters():  # a tied head counts once
        kind = matrices if parameter.ndim > 1 else gguf.GGMLQuantizationType.F32
        stored = names.get_name(name, try_suffixes=(".weight",))
        assert stored is not None, name
        try:
            data = gguf.quantize(parameter.detach().to(torch.float32).numpy(), kind)
        except gguf.QuantError as error:
            raise UserError(f"{name} cannot be stored as {outtype}: {error}") from error
        writer.add_tensor(stored, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_FILE_TYPES = {
    "f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"
}  # fmt: skip
