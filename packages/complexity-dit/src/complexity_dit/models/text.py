"""Text encoders: a complexity-lm model or any of transformers, and the hidden states of prompts.

transformers and complexity-lm are needed by models that read text alone, so they are imported here
when one is built.
"""

import logging
import unicodedata
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from complexity_dit.config import TextEncoderConfig
from complexity_dit.hub import reach_hub
from complexity_dit.models.loading import describe, load_weights
from inl_core.run.errors import UserError
from inl_core.run.hub import download_weights
from inl_core.run.json_files import one_line
from inl_core.run.settings import nearest
from inl_core.run.weights import tensor_shapes, weights_fit

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# A vocabulary of captions is small, and so is what can be learnt from them: 0.9M parameters.
_NEW_MODEL = {
    "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3,
    "num_attention_heads": 4,
}  # fmt: skip
_TOKENIZER_FILES = ("*.txt", "*.model")
_AS_DATA: dict[str, Any] = {"trust_remote_code": False}


def optional_package(name: str, purpose: str) -> Any:
    """Import a module of a package that only models with a text encoder need.

    Raises:
        UserError: It is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0].replace("_", "-")
        raise UserError(
            f"{purpose} needs {package}: pip install 'complexity-dit[text]' ({error})"
        ) from error


def build_text_encoder(
    config: TextEncoderConfig, captions: Iterable[str] = ()
) -> "tuple[PreTrainedTokenizerBase, PreTrainedModel] | tuple[None, None]":
    """Build or load the tokenizer and the text encoder of a run, in fp32.

    Args:
        config: Its `source` decides. "none" gives two Nones. "lm" is a new complexity-lm model,
            drawn from torch's random numbers, with a byte-level BPE trained on `captions`;
            "lm:PATH" is a trained one without its head. "hf:ID_OR_PATH" is the encoder of any
            transformers model (of T5 or CLIP the half that reads text).
        captions: Texts to train the tokenizer of a new model on; at least one.

    Returns:
        Tokenizer and encoder. The encoder is in evaluation mode; it has gradients only if
        `config.trains`.

    Raises:
        UserError: A package is missing, there is no such model, it cannot be loaded, its weights
            are a pickle, or tokenizer and encoder do not belong together.
    """
    kind, _, place = config.source.partition(":")
    if kind == "none":
        return None, None
    if kind == "hf":
        tokenizer, encoder = _load_transformers(place)
    else:
        tokenizer, encoder = _load_lm(place) if place else _new_lm(config, captions)
        encoder.config.use_bidirectional_attention = config.bidirectional
    tokenizer.padding_side = "right"
    check_text_encoder(tokenizer, encoder, config.max_length)
    return tokenizer, encoder.float().eval().requires_grad_(config.trains)


def _new_lm(config: TextEncoderConfig, captions: Iterable[str]) -> tuple[Any, Any]:
    """A new complexity-lm model, and a tokenizer for its captions."""
    lm = optional_package("complexity_lm", "text_encoder.source lm")
    train_tokenizer = optional_package("complexity_lm.tokenizer", "its tokenizer").train_tokenizer
    texts = [checked_prompt(caption) for caption in captions]
    if not any(texts):
        raise UserError(
            "text_encoder.source lm learns its words from the captions, and there is none: name "
            "data.text_column or data.caption_template, or take a trained model (lm:PATH)"
        )
    sizes = _sizes(lm, config)
    tokenizer = train_tokenizer(texts, sizes.pop("vocab_size"))
    ids = {
        name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")
    }
    return tokenizer, _built(lm, config, ids | sizes | {"vocab_size": len(tokenizer)})


def _sizes(lm: Any, config: TextEncoderConfig) -> dict[str, Any]:
    """Arguments of DeepConfig for a new model."""
    known = list(lm.DeepConfig.__dataclass_fields__)
    if wrong := [name for name in config.overrides if name not in known]:
        raise UserError(
            f"text_encoder.overrides has no field {wrong[0]!r}{nearest(wrong[0], known)}"
        )
    return _NEW_MODEL | {"max_position_embeddings": config.max_length} | config.overrides


def _built(lm: Any, config: TextEncoderConfig, sizes: dict[str, Any]) -> Any:
    """A new complexity-lm model of these sizes."""
    try:
        return lm.DeepModel(lm.DeepConfig(**sizes))
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise UserError(f"text_encoder.overrides {config.overrides}: {error}") from error


def _load_lm(place: str) -> tuple[Any, Any]:
    """A trained complexity-lm model without its head."""
    lm = optional_package("complexity_lm", f"text_encoder.source lm:{place}")
    loading = optional_package("complexity_lm.loading", f"text_encoder.source lm:{place}")
    loaded = loading.load(place, device="cpu")
    encoder = loaded.model.base_model
    if not isinstance(encoder, lm.DeepModel):
        raise UserError(
            f"{place} is a {type(loaded.model).__name__}, no complexity-lm model: take it as "
            f"text_encoder.source hf:{place}"
        )
    return loaded.tokenizer, encoder


def _load_transformers(place: str) -> tuple[Any, Any]:
    """The text encoder and the tokenizer in a folder or of a Hub id."""
    transformers = optional_package("transformers", f"text_encoder.source hf:{place}")
    source = _folder_or_id(place)
    folder = source if isinstance(source, Path) else download_weights(place, {}, _TOKENIZER_FILES)

    # A config class may make lists as long as its number of layers: not before it is checked.
    def build(_: dict[str, Any]) -> nn.Module:
        cls, own = _reading_class(folder)
        return cls(own)

    def load(source: Any, **given: Any) -> Any:
        cls, own = _reading_class(folder)
        return cls.from_pretrained(source, config=own, **given)

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **_AS_DATA)
        encoder, info = load_weights(
            load, build, folder, allow_unused=True, optional=("pooler.",), output_loading_info=True
        )
    except Exception as error:  # of any type: transformers validates few values of a config.json
        raise UserError(f"cannot load the text encoder {place}: {describe(error)}") from error
    for name in info["missing_keys"]:  # a pooler, which nothing here reads: not random at least
        nn.init.zeros_(encoder.get_parameter(name))
    return tokenizer, encoder


def _folder_or_id(place: str) -> Path | str:
    """The folder of a text encoder, or the id of one on the Hub, which can be reached."""
    folder = Path(place).expanduser()
    if folder.is_dir():
        return folder
    if place.count("/") != 1 or place.startswith((".", "~", "/")):
        raise UserError(f"there is no folder {place}: pass one, or a Hub id")
    reach_hub(f"text encoder {place}", "download it elsewhere and pass the folder")
    return place


def outline_text_encoder(config: TextEncoderConfig) -> "PreTrainedModel":
    """The text encoder of a run without its weights, from its config alone, to count it.

    A new one has the whole vocabulary that it may have. It is built where torch is told to.

    Raises:
        UserError: As `build_text_encoder`.
    """
    kind, _, place = config.source.partition(":")
    lm = kind == "lm" and optional_package("complexity_lm", f"text_encoder.source {config.source}")
    if not place:
        encoder = _built(lm, config, _sizes(lm, config))
    else:
        optional_package("transformers", f"text_encoder.source {config.source}")
        try:
            if lm:
                folder = import_module("complexity_lm.loading").find_model(place)
                encoder = lm.DeepModel(lm.DeepConfig.from_pretrained(folder))
            else:
                cls, own = _reading_class(_folder_or_id(place))
                encoder = cls(own)
        except UserError:
            raise
        except Exception as error:  # of any type, as in `_load_transformers`
            raise UserError(f"cannot read the text encoder {place}: {describe(error)}") from error
    if lm:
        encoder.config.use_bidirectional_attention = config.bidirectional
    return encoder.requires_grad_(config.trains)


def _reading_class(source: Path | str) -> tuple[Any, Any]:
    """The class that reads text of the model in a folder or of a Hub id, and its config."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(source, **_AS_DATA)
    if type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING:
        return transformers.MODEL_FOR_TEXT_ENCODING_MAPPING[type(config)], config
    config = getattr(config, "text_config", config)
    return transformers.MODEL_MAPPING[type(config)], config


def check_text_weights(folder: Path, cls: Any) -> None:
    """Check that the weights beside a config fill a text encoder of that class, and are not more.

    transformers draws tensors that are missing at random, and logs it.

    Raises:
        UserError: A tensor is missing, or the config describes more than the weights fill.
    """
    networks = []

    def build(_: dict[str, Any]) -> nn.Module:
        networks.append(cls(cls.config_class.from_pretrained(folder)))
        return networks[0]

    weights_fit(folder, build)
    saved = tensor_shapes(folder)
    names: dict[int, list[str]] = {}
    for network in networks:
        tied = set(getattr(network, "_tied_weights_keys", None) or ())
        for name, parameter in network.named_parameters(remove_duplicate=False):
            if name not in tied:
                names.setdefault(id(parameter), []).append(name)
    for aliases in names.values():  # of tied weights one is saved
        if saved and not saved.keys() & set(aliases):
            raise UserError(f"the text encoder in {folder} lacks the tensor {aliases[0]}")


def text_width(encoder: "PreTrainedModel") -> int:
    """Width of the hidden states of a text encoder, the network's `caption_channels`."""
    return int(encoder.config.hidden_size)


def check_text_encoder(tokenizer: Any, encoder: Any, max_length: int) -> None:
    """Check that a tokenizer can feed a text encoder.

    Raises:
        UserError: The tokenizer has larger ids than the encoder, none for padding, or no fast
            version; or the encoder has fewer positions than `max_length`.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"the tokenizer is a {type(tokenizer).__name__}, which has no fast version: use one "
            "that has (tokenizer.json)"
        )
    largest = max(tokenizer.get_vocab().values(), default=-1)
    rows = encoder.get_input_embeddings().num_embeddings
    if largest >= rows:
        raise UserError(
            f"the tokenizer has ids up to {largest}, the text encoder {rows} (vocab_size): they do "
            "not belong together; use the tokenizer that the encoder was trained with"
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise UserError("the tokenizer has no padding token (pad_token), and no eos_token")
        tokenizer.pad_token = tokenizer.eos_token  # the attention mask covers padding
    positions = getattr(encoder.config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise UserError(
            f"the text encoder has {positions} positions, fewer than max_length {max_length}: set "
            "a smaller one"
        )


def checked_prompt(prompt: str | None) -> str:
    """A prompt with single spaces; None is the empty one.

    Raises:
        UserError: It is not a string, or it contains control characters or lone surrogates.
    """
    if prompt is None:
        return ""
    if not isinstance(prompt, str):
        raise UserError(f"prompt {prompt!r} is {type(prompt).__name__}, expected text")
    for character in prompt:
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\t\n\r":
            raise UserError(
                f"prompt {one_line(prompt)!r} has the control character U+{ord(character):04X}: "
                "remove it"
            )
    return " ".join(prompt.split())


def encode_prompts(
    tokenizer: "PreTrainedTokenizerBase",
    encoder: "PreTrainedModel",
    prompts: Sequence[str | None],
    max_length: int,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """The hidden states of prompts, padded to one length.

    The bits of a row depend on the number of rows. Those of its padding have no meaning.

    Args:
        tokenizer: As `build_text_encoder` returns it.
        encoder: Likewise; its gradients are recorded unless torch is told not to.
        prompts: B texts; an empty one and None are the null text of the network.
        max_length: Tokens of a row, T. A longer prompt is cut; see `warn_of_cut`.
        device: Where to put the tokens; None is where the encoder is.

    Returns:
        Hidden states (B, T, C) and a boolean mask (B, T), True at tokens; a row of an empty prompt
        has none.

    Raises:
        UserError: A prompt is not a string, or it contains control characters.
    """
    texts = [checked_prompt(prompt) for prompt in prompts]
    device = encoder.device if device is None else device
    batch = tokenizer(
        texts, padding="max_length", truncation=True, max_length=max_length,
        padding_side="right", return_tensors="pt",
    )  # fmt: skip
    ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
    states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    has_words = torch.tensor([bool(text) for text in texts], device=mask.device)
    return states, mask.bool() & has_words[:, None]


def warn_of_cut(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str | None], max_length: int
) -> None:
    """Log how many prompts are longer than `max_length` tokens, and what the first one loses."""
    texts = [checked_prompt(prompt) for prompt in prompts]
    encodings = tokenizer(texts, truncation=True, max_length=max_length).encodings or []
    if cut := [one for one in encodings if one.overflowing]:
        rest = tokenizer.decode(cut[0].overflowing[0].ids, skip_special_tokens=True)
        logger.warning(
            "%d of %d prompts have more than %d tokens and are cut; the first one loses %r",
            len(cut), len(texts), max_length, one_line(str(rest)),
        )  # fmt: skip
