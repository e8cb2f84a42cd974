"""The command line: `complexity-lm demo | train | generate | evaluate | tokenizer | inspect`."""

import inspect as python_inspect
import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser, set_parsing_settings

from complexity_lm import __version__
from inl_core.run.errors import UserError
from inl_core.run.json_files import printable, unreadable

_NO_FLAG = {
    # No meaning here: objects, a model's own role, and what only encoder-decoder models have.
    "return_dict_in_generate", "is_assistant", "compile_config", "watermarking_config",
    "encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "decoder_start_token_id",
}  # fmt: skip
_TYPES: dict[str, Any] = {"int": int, "float": float, "bool": bool, "str": str}


def generation_flags() -> dict[str, tuple[Any, str]]:
    """Type and help of every generation setting of transformers, read from its `GenerationConfig`.

    A setting whose documentation names no single plain type takes any YAML value.
    """
    from transformers import GenerationConfig

    text = python_inspect.getdoc(GenerationConfig) or ""
    entry = re.compile(r"^ {4}(\w+) ?:? ?\((.*?)\)+: *\n((?: {8}.*\n|\n(?= {8}))+)", re.MULTILINE)
    told = {name: (kind, " ".join(words.split())) for name, kind, words in entry.findall(text)}
    flags = {}
    for name in vars(GenerationConfig()):
        # What it has and does not document is gone: it needs code from the hub.
        if name not in told or name.startswith("output_") or name in _NO_FLAG:
            continue
        kind, words = told[name]
        named = re.match(r"`(\w+)`(?! or)", kind)
        plain = _TYPES.get(named[1], Any) if named else Any
        flags[name] = (plain if plain is Any else plain | None, words.split(". ")[0].rstrip("."))
    return flags


def build_parser() -> ArgumentParser:
    """All commands; options and their help come from the dataclasses they fill."""
    from complexity_lm.config import TrainConfig
    from complexity_lm.data import DataConfig
    from complexity_lm.evaluate import EvalConfig
    from complexity_lm.generate import GenerateConfig
    from complexity_lm.tokenizer import TokenizerConfig

    set_parsing_settings(
        docstring_parse_attribute_docstrings=True, add_print_completion_argument=True
    )
    parser = ArgumentParser(prog="complexity-lm", description=__doc__, version=__version__)
    commands = parser.add_subcommands()

    demo = ArgumentParser(description="Train on the standard library's source, write, measure.")
    demo.add_argument("--out", type=str, default="runs/demo-lm", help="folder of the demo")
    commands.add_subcommand("demo", demo)

    train = ArgumentParser(description="Train a model, or go on with a run.")
    train.add_argument("--config", action="config", help="a YAML with any of the options below")
    train.add_class_arguments(TrainConfig, None)
    commands.add_subcommand("train", train)

    generate = ArgumentParser(description="Continue a prompt; all of transformers' options work.")
    generate.add_argument("model", type=str, help="model folder, folder of a run, or Hub id")
    generate.add_argument(
        "--prompt", type=str, default=None, help="the text; standard input without it"
    )
    generate.add_argument(
        "--prompts_file",
        type=str | None,
        default=None,
        help="a file with one prompt a line; a line that begins with a quote is a JSON string",
    )
    generate.add_argument(
        "--tokenizer", type=str | None, default=None, help="another tokenizer: folder or Hub id"
    )
    generate.add_argument(
        "--assistant_model",
        type=str | None,
        default=None,
        help="a smaller model with the same tokenizer, for assisted decoding",
    )
    generate.add_class_arguments(GenerateConfig, None)
    for name, (kind, words) in generation_flags().items():
        generate.add_argument(f"--{name}", type=kind, default=None, help=words.replace("%", "%%"))
    commands.add_subcommand("generate", generate)

    evaluate = ArgumentParser(description="Loss, perplexity, bits per byte; lm-eval tasks.")
    evaluate.add_argument("model", type=str, help="model folder, folder of a run, or Hub id")
    evaluate.add_argument(
        "--source", type=str | None, default=None, help="stdlib | text:PATH | hub:NAME"
    )
    evaluate.add_argument("--out", type=str, default="runs/evaluation-lm", help="gets result.json")
    evaluate.add_class_arguments(EvalConfig, None)
    evaluate.add_argument(
        "--data",
        type=DataConfig | None,
        default=None,
        help="how the source is read; as in the model's training by default",
    )
    commands.add_subcommand("evaluate", evaluate)

    tokenizer = ArgumentParser(description="Train a byte-level BPE on the training side of a text.")
    tokenizer.add_argument(
        "--source", type=str, required=True, help="stdlib | text:PATH | hub:NAME"
    )
    tokenizer.add_argument("--out", type=str, required=True, help="folder of the tokenizer")
    tokenizer.add_argument(
        "--vocab_size", type=int, default=TokenizerConfig.vocab_size, help="number of ids"
    )
    tokenizer.add_argument(
        "--data", type=DataConfig | None, default=None, help="how the source is read"
    )
    commands.add_subcommand("tokenizer", tokenizer)

    inspect = ArgumentParser(description="Say what a model folder or a checkpoint holds.")
    inspect.add_argument("model", type=str, help="model folder, folder of a run, or checkpoint")
    commands.add_subcommand("inspect", inspect)
    return parser


def run(arguments: Sequence[str]) -> None:
    """Parse and run one command."""
    command, options = parse(arguments)
    _COMMANDS[command](options)


def parse(
    arguments: Sequence[str], parser: ArgumentParser | None = None
) -> tuple[str, dict[str, Any]]:
    """The command and its options, of the types that they have; nothing is run.

    Args:
        arguments: The words after the program's name.
        parser: Of `build_parser`, to parse many times with; built by default.
    """
    parser = parser or build_parser()
    try:
        parsed = parser.instantiate(parser.parse_args(list(arguments)))
    except UserError:
        raise
    except Exception as error:  # the parser lets through what a value makes its own code raise
        raise UserError(unreadable(error)) from error
    return parsed.subcommand, parsed[parsed.subcommand].as_dict()


def _demo(options: dict[str, Any]) -> None:
    from complexity_lm.demo import demo

    demo(options["out"])


def _train(options: dict[str, Any]) -> None:
    from complexity_lm.config import TrainConfig
    from complexity_lm.train import train

    options.pop("config")
    folder = train(TrainConfig(**options))
    if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
        print(f"the model is in {folder}")


def _generate(options: dict[str, Any]) -> None:
    from complexity_lm.generate import GenerateConfig, print_generated, read_prompts
    from complexity_lm.loading import load

    prompts = read_prompts(options.pop("prompt"), options.pop("prompts_file"), sys.stdin)
    settings = {name: options.pop(name) for name in generation_flags()}
    model, tokenizer = options.pop("model"), options.pop("tokenizer")
    assistant = options.pop("assistant_model")
    config = GenerateConfig(**options)
    loaded = load(model, tokenizer, config.device)
    helper = load(assistant, tokenizer, config.device) if assistant else None
    print_generated(loaded, prompts, settings, config, helper)


def _evaluate(options: dict[str, Any]) -> None:
    from complexity_lm.evaluate import EvalConfig, evaluate

    own = {name: options.pop(name) for name in ("source", "out", "data")}
    evaluate(options.pop("model"), **own, config=EvalConfig(**options))


def _tokenizer(options: dict[str, Any]) -> None:
    from complexity_lm.tokenizer import make_tokenizer

    print(make_tokenizer(**options))


def _inspect(options: dict[str, Any]) -> None:
    import yaml

    from complexity_lm.inspect_model import inspect

    print(yaml.safe_dump(inspect(options["model"]), sort_keys=False), end="")


_COMMANDS = {
    "demo": _demo,
    "train": _train,
    "generate": _generate,
    "evaluate": _evaluate,
    "tokenizer": _tokenizer,
    "inspect": _inspect,
}


def main() -> None:
    """Run a command; wrong input ends with its message and exit status 2, not with a traceback."""
    if sys.argv[1:] == ["--version"]:  # asked by scripts: the parser would import everything first
        print(f"complexity-lm {__version__}")
        return
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    for chatty in ("httpx", "datasets", "fsspec", "accelerate", "lm_eval"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        run(sys.argv[1:])
    except UserError as error:
        sys.exit(_fail(f"complexity-lm: error: {error}", 2))
    except KeyboardInterrupt:
        sys.exit(_fail("complexity-lm: interrupted; checkpoints already written are whole", 130))


def _fail(message: str, status: int) -> int:
    print(printable(message), file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
