"""The command line of complexity-lm: train, generate, chat, evaluate and the others."""

import inspect as python_inspect
import os
import re
import sys
from typing import Any, Literal

import yaml
from transformers import GenerationConfig
from transformers.utils.logging import disable_progress_bar

from complexity_lm import __version__
from complexity_lm.config import (
    DataConfig,
    EvalConfig,
    GenerateConfig,
    TokenizerConfig,
    TrainConfig,
)
from inl_core.run.commands import Command, Option, Program
from inl_core.run.settings import Scalar, Setting

_EXCLUDED_OPTIONS = {
    # Objects, settings of assistant models, and of encoder-decoder models.
    "return_dict_in_generate", "is_assistant", "compile_config", "watermarking_config",
    "encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "decoder_start_token_id",
}  # fmt: skip
_TYPES: dict[str, Any] = {"int": int, "float": float, "bool": bool, "str": str}
_OPEN = Setting | dict[str, Scalar]
_SOURCE_FORMS = "stdlib | text:PATH | hub:NAME"


def generation_flags() -> dict[str, tuple[Any, str]]:
    """Type and help of every generation setting, read from the docstring of `GenerationConfig`.

    A setting whose documentation does not name a single plain type accepts any data.
    """
    text = python_inspect.getdoc(GenerationConfig) or ""
    entry = re.compile(r"^ {4}(\w+) ?:? ?\((.*?)\)+: *\n((?: {8}.*\n|\n(?= {8}))+)", re.MULTILINE)
    documented = {
        name: (kind, " ".join(words.split())) for name, kind, words in entry.findall(text)
    }
    flags = {}
    for name in vars(GenerationConfig()):
        # Undocumented settings are deprecated: they need code from the Hub.
        if name not in documented or name.startswith("output_") or name in _EXCLUDED_OPTIONS:
            continue
        kind, words = documented[name]
        named = re.match(r"`(\w+)`(?! or)", kind)
        plain = _TYPES.get(named[1], _OPEN) if named else _OPEN
        flags[name] = (plain | None, words.split(". ")[0].rstrip("."))
    return flags


def _demo(out: str) -> None:
    from complexity_lm.demo import demo

    demo(out)


def _train(config: TrainConfig) -> None:
    from complexity_lm.train import train

    folder = train(config)
    if os.environ.get("RANK", "0") == "0":
        print(f"the model is in {folder}")


def _generate(
    config: GenerateConfig,
    model: str,
    prompt: str | None,
    prompts_file: str | None,
    tokenizer: str | None,
    assistant_model: str | None,
    **settings: Any,
) -> None:
    from complexity_lm.generate import print_generated, read_prompts
    from complexity_lm.loading import load

    prompts = read_prompts(prompt, prompts_file, sys.stdin)
    loaded = load(model, tokenizer, config.device)
    helper = load(assistant_model, tokenizer, config.device) if assistant_model else None
    print_generated(loaded, prompts, settings, config, helper)


def _chat(
    config: GenerateConfig,
    model: str,
    system: str | None,
    tokenizer: str | None,
    **settings: Any,
) -> None:
    from complexity_lm.chat import chat, typed_lines
    from complexity_lm.loading import load, repeating

    loaded = load(model, tokenizer, config.device)
    with repeating(loaded, config.num_loops):
        chat(loaded, typed_lines(), sys.stdout, settings, system, config.seed)


def _evaluate(config: EvalConfig, model: str, **options: Any) -> None:
    from complexity_lm.evaluate import evaluate

    evaluate(model, **options, config=config)


def _tokenizer(**options: Any) -> None:
    from complexity_lm.data import make_tokenizer

    print(make_tokenizer(**options))


def _export(model: str, out: str, format: str, outtype: Any) -> None:
    from complexity_lm.export import export_gguf

    print(export_gguf(model, out, outtype))


def _inspect(model: str) -> None:
    from complexity_lm.inspect_model import inspect

    print(yaml.safe_dump(inspect(model), sort_keys=False), end="")


_GENERATION = {
    "options of transformers' GenerationConfig": {
        name: Option(words, None, kind) for name, (kind, words) in generation_flags().items()
    }
}
_MODEL = {
    "model": Option("model folder, folder of a run, checkpoint, name in checkpoints/, or Hub id")
}

# Each command imports what it needs itself, so that `--help` loads neither datasets nor Trainer.
COMMANDS = {
    "demo": Command(
        "Train on the standard library's source, generate text, compare with gzip.",
        _demo,
        options={"out": Option("Folder of the demo.", "runs/demo-lm")},
    ),
    "train": Command(
        "Train a model, or resume a run.",
        _train,
        configs=[TrainConfig],
        has_config=True,
        renamed={"tracker": "report_to"},  # of version 0.1.0
    ),
    "generate": Command(
        "Continue a prompt; accepts transformers' options.",
        _generate,
        _MODEL,
        {
            name: Option(words, None, str | None)
            for name, words in (
                ("prompt", "The text to continue; by default standard input."),
                ("prompts_file", "A file with a prompt per line; lines in quotes are JSON texts."),
                ("tokenizer", "Another tokenizer: folder or Hub id."),
                (
                    "assistant_model",
                    "A smaller model with the same tokenizer, to draft.",
                ),
            )
        },
        [GenerateConfig],
        others=_GENERATION,
    ),
    "chat": Command(
        "Talk to a model that has a chat template; accepts transformers' options.",
        _chat,
        _MODEL,
        {
            "system": Option("What the model is told before the first turn.", None, str | None),
            "tokenizer": Option("Another tokenizer: folder or Hub id.", None, str | None),
        },
        [GenerateConfig],
        others=_GENERATION,
        skip=frozenset({"batch_size", "only_new"}),
    ),
    "evaluate": Command(
        "Measure loss, perplexity, bits per byte, lm-eval tasks.",
        _evaluate,
        _MODEL,
        {
            "source": Option(_SOURCE_FORMS, None, str | None),
            "out": Option("Folder for result.json.", "runs/evaluation-lm"),
            "data": Option(
                "How to read the source; by default as in the training of the model.",
                None,
                DataConfig | None,
            ),
        },
        [EvalConfig],
    ),
    "tokenizer": Command(
        "Train a byte-level BPE on the training side of a text.",
        _tokenizer,
        options={
            "source": Option(_SOURCE_FORMS),
            "out": Option("Folder of the tokenizer."),
            "vocab_size": Option("Number of ids.", TokenizerConfig.vocab_size, int),
            "data": Option("How to read the source.", None, DataConfig | None),
        },
    ),
    "export": Command(
        "Write a model as a file for llama.cpp, where that has its architecture.",
        _export,
        _MODEL,
        {
            "out": Option("The file."),
            "format": Option("Form of the file.", "gguf", Literal["gguf"]),
            "outtype": Option(
                "Type of the matrices.", "f32", Literal["f32", "f16", "bf16", "q8_0"]
            ),
        },
    ),
    "inspect": Command("Print the contents of a model folder or checkpoint.", _inspect, _MODEL),
}
PROGRAM = Program("complexity-lm", __doc__ or "", __version__, COMMANDS)
run = PROGRAM.run


def main() -> None:
    """Run the command of the shell; see `Program.main`."""
    if not sys.stderr.isatty():
        disable_progress_bar()  # it is imported already, and reads no switch after that
    PROGRAM.main(quiet=["accelerate", "lm_eval"])


if __name__ == "__main__":
    main()
