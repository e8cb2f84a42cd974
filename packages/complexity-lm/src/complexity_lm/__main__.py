"""The command line: `complexity-lm demo | train | generate | evaluate | tokenizer | inspect`."""

import inspect as python_inspect
import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings
from transformers import GenerationConfig

from complexity_lm import __version__
from complexity_lm.config import (
    DataConfig,
    EvalConfig,
    GenerateConfig,
    TokenizerConfig,
    TrainConfig,
)
from inl_core.run.errors import UserError
from inl_core.run.json_files import describe_settings_error, printable

_EXCLUDED_OPTIONS = {
    # Objects, settings of assistant models, and of encoder-decoder models.
    "return_dict_in_generate", "is_assistant", "compile_config", "watermarking_config",
    "encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "decoder_start_token_id",
}  # fmt: skip
_TYPES: dict[str, Any] = {"int": int, "float": float, "bool": bool, "str": str}
_SOURCE_FORMS = "stdlib | text:PATH | hub:NAME"


def generation_flags() -> dict[str, tuple[Any, str]]:
    """Type and help of every generation setting, read from the docstring of `GenerationConfig`.

    A setting whose documentation does not name a single plain type accepts any YAML value.
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
        plain = _TYPES.get(named[1], Any) if named else Any
        flags[name] = (plain if plain is Any else plain | None, words.split(". ")[0].rstrip("."))
    return flags


def build_parser() -> ArgumentParser:
    """Create the parser of all commands; most options are fields of dataclasses in `config`."""
    set_parsing_settings(
        docstring_parse_attribute_docstrings=True, add_print_completion_argument=True
    )
    parser = ArgumentParser(prog="complexity-lm", description=__doc__, version=__version__)
    commands = parser.add_subcommands()
    model_help = "model folder, folder of a run, checkpoint, or Hub id"

    def add_command(name: str, description: str) -> ArgumentParser:
        command = ArgumentParser(description=description)
        commands.add_subcommand(name, command)
        return command

    demo = add_command(
        "demo", "Train on the standard library's source, generate text, compare with gzip."
    )
    demo.add_argument("--out", type=str, default="runs/demo-lm", help="folder of the demo")

    train = add_command("train", "Train a model, or resume a run.")
    train.add_argument(
        "--config", action="config", help="a YAML file with any of the options below"
    )
    train.add_class_arguments(TrainConfig, None)

    generate = add_command("generate", "Continue a prompt; accepts transformers' options.")
    generate.add_argument("model", type=str, help=model_help)
    for name, words in (
        ("prompt", "the text to continue; by default standard input"),
        ("prompts_file", "a file with one prompt per line; lines in quotes are JSON strings"),
        ("tokenizer", "another tokenizer: folder or Hub id"),
        ("assistant_model", "a smaller model with the same tokenizer, for assisted decoding"),
    ):
        generate.add_argument(f"--{name}", type=str | None, default=None, help=words)
    generate.add_class_arguments(GenerateConfig, None)
    for name, (kind, words) in generation_flags().items():
        generate.add_argument(f"--{name}", type=kind, default=None, help=words.replace("%", "%%"))

    evaluate = add_command("evaluate", "Measure loss, perplexity, bits per byte, lm-eval tasks.")
    evaluate.add_argument("model", type=str, help=model_help)
    evaluate.add_argument("--source", type=str | None, default=None, help=_SOURCE_FORMS)
    evaluate.add_argument(
        "--out", type=str, default="runs/evaluation-lm", help="folder for result.json"
    )
    evaluate.add_class_arguments(EvalConfig, None)
    evaluate.add_argument(
        "--data",
        type=DataConfig | None,
        default=None,
        help="how to read the source; by default as in the training of the model",
    )

    tokenizer = add_command("tokenizer", "Train a byte-level BPE on the training side of a text.")
    tokenizer.add_argument("--source", type=str, required=True, help=_SOURCE_FORMS)
    tokenizer.add_argument("--out", type=str, required=True, help="folder of the tokenizer")
    tokenizer.add_argument(
        "--vocab_size", type=int, default=TokenizerConfig.vocab_size, help="number of ids"
    )
    tokenizer.add_argument(
        "--data", type=DataConfig | None, default=None, help="how to read the source"
    )

    inspect = add_command("inspect", "Print the contents of a model folder or checkpoint.")
    inspect.add_argument("model", type=str, help=model_help)
    return parser


def parse(
    arguments: Sequence[str], parser: ArgumentParser | None = None
) -> tuple[str, dict[str, Any]]:
    """Parse a command and its options to typed values, without running it.

    Raises:
        UserError: A value is invalid.
        SystemExit: With status 2, if the parser rejects an argument.
    """
    parser = parser or build_parser()
    try:
        parsed = parser.instantiate(parser.parse_args(list(arguments)))
    except UserError:
        raise
    except Exception as error:  # jsonargparse passes on what it does not expect
        raise UserError(describe_settings_error(error)) from error
    return parsed.subcommand, parsed[parsed.subcommand].as_dict()


def run(arguments: Sequence[str]) -> None:
    """Parse and run one command.

    Each imports what it needs itself, so that `--help` loads neither datasets nor Trainer.
    """
    command, options = parse(arguments)
    match command:
        case "demo":
            from complexity_lm.demo import demo

            demo(**options)
        case "train":
            from complexity_lm.train import train

            options.pop("config")
            folder = train(TrainConfig(**options))
            if os.environ.get("RANK", "0") == "0":
                print(f"the model is in {folder}")
        case "generate":
            from complexity_lm.generate import print_generated, read_prompts
            from complexity_lm.loading import load

            prompts = read_prompts(options.pop("prompt"), options.pop("prompts_file"), sys.stdin)
            settings = {name: options.pop(name) for name in generation_flags()}
            model, tokenizer = options.pop("model"), options.pop("tokenizer")
            assistant = options.pop("assistant_model")
            config = GenerateConfig(**options)
            loaded = load(model, tokenizer, config.device)
            helper = load(assistant, tokenizer, config.device) if assistant else None
            print_generated(loaded, prompts, settings, config, helper)
        case "evaluate":
            from complexity_lm.evaluate import evaluate

            own = {name: options.pop(name) for name in ("source", "out", "data")}
            evaluate(options.pop("model"), **own, config=EvalConfig(**options))
        case "tokenizer":
            from complexity_lm.data import make_tokenizer

            print(make_tokenizer(**options))
        case "inspect":
            from complexity_lm.inspect_model import inspect

            print(yaml.safe_dump(inspect(options["model"]), sort_keys=False), end="")


def main() -> None:
    """Run a command; a `UserError` is printed without a traceback and gives exit status 2."""
    if sys.argv[1:] == ["--version"]:  # without building the parser
        print(f"complexity-lm {__version__}")
        return
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    for name in ("httpx", "datasets", "fsspec", "accelerate", "lm_eval"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        run(sys.argv[1:])
    except UserError as error:
        message, status = f"complexity-lm: error: {error}", 2
    except KeyboardInterrupt:
        message, status = ("complexity-lm: interrupted; all written checkpoints are complete", 130)
    else:
        return
    print(printable(message), file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
