"""The run of `configs/lm/stories.yaml` as a folder of `checkpoints/`, with a card.

    python -m benchmarks.study.stories_checkpoint runs/stories --out checkpoints/lm-stories

The folder gets the weights in bf16, the tokenizer, thirty lines of text, and what is measured of
these weights on the held-out stories: bits per byte, beside `gzip -9`, an order-5 model of bytes
that is counted on the training stories, and a Llama of as many parameters that is trained on the
same blocks for the same time. The Llama is trained here, in RUN/llama, unless it is there already;
its number of steps comes from the ratio of step times, measured in turn. The card reads its numbers
from `result.json`.
"""

import argparse
import copy
import json
from dataclasses import replace
from pathlib import Path

import torch
from benchmarks.common.fields import with_fields
from benchmarks.common.memory import parameters
from benchmarks.common.results import commit, hardware
from benchmarks.common.timing import DEVICE, paired
from benchmarks.speed.bench_lm import SHAPE, trainer
from benchmarks.study.ablation_study import flat
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from complexity_lm.config import EvalConfig, TrainConfig
from complexity_lm.data import load_split
from complexity_lm.demo import sample_lines
from complexity_lm.evaluate import ByteModel, evaluate, gzip_bits_per_byte
from complexity_lm.loading import load, read_training_file, write_training_file
from complexity_lm.train import train
from inl_core.run.files import atomic_file, atomic_folder
from inl_core.run.json_files import read_json_object

ORDER = 5
ORDER_KEY = f"order{ORDER}_bits_per_byte"
PROMPTS = ("Once upon a time", "One day", "There was a little", "Tom and Lily")
NEW_TOKENS = 200
ROUNDS = 15

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
language: en
license: apache-2.0
datasets: [roneneldan/TinyStories]
---

# Short stories

A language model of {parameters:.1f} million parameters with INL dynamics, trained on
{train_bytes:.1f} MB of TinyStories: {tokens:.1f} million tokens, each story about {passes:.0f}
times. It writes short stories in simple words and knows nothing else.

```python
from transformers import pipeline

write = pipeline("text-generation", "{name}", trust_remote_code=True)
print(write("Once upon a time", max_new_tokens=200)[0]["generated_text"])
```

The code in the folder needs the package `inl_core`. With `complexity_lm` installed:
`complexity-lm generate {name} --prompt "Once upon a time" --do_sample true --temperature 0.7`.

## Bits per byte

{documents} stories that were held out of the training, {bytes:,} bytes:

{table}

One seed. The Llama has {llama_parameters:.1f} million parameters and made {llama_steps} steps in
place of {steps}: one of its steps took {llama_time:.3f} of the time of one of this model. Numbers:
[result.json](result.json), by `{command}` at commit {commit}.

## Text

As it came, `temperature` 0.7 and `top_p` 0.95, seeds 0, 1, 2, …; prompts are the first words:

```
{samples}```
"""


def llama_like(model):
    """A Llama with the layers, widths and heads of a model, the MLP widened to its parameters."""

    def build(wider):
        shape = {name: getattr(model.config, name) for name in SHAPE}
        shape["intermediate_size"] += wider
        ends = {name: getattr(model.config, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        return LlamaForCausalLM(
            LlamaConfig(**shape, **{f"{name}_token_id": end for name, end in ends.items()})
        )

    wanted, plain = parameters(model), parameters(build(0))
    wider = round((wanted - plain) / (parameters(build(1)) - plain))
    llama = build(wider)
    assert abs(parameters(llama) - wanted) < 0.005 * wanted
    return llama


def train_llama(folder, model, config, resolved, rounds):
    """Train a Llama for the time that the model took; returns its result."""
    steps_file, out = folder / "steps.json", folder / "run"
    if not steps_file.exists():
        ids = torch.randint(model.config.vocab_size, (config.batch_size, config.data.context))
        dtype = "bf16" if resolved["mixed_precision"] == "bf16" else "fp32"
        works = {
            name: trainer(network.to(DEVICE), ids.to(DEVICE), resolved["compile"], dtype)
            for name, network in (("model", copy.deepcopy(model)), ("llama", llama_like(model)))
        }
        ratio = paired(works, rounds, DEVICE)["llama"][1]
        folder.mkdir(exist_ok=True)
        with atomic_file(steps_file) as partial:
            partial.write_text(json.dumps({"time": ratio, "steps": round(config.steps / ratio)}))
    planned = read_json_object(steps_file)
    if not (out / "result.json").exists():

        def build(config, tokenizer, tokens):
            torch.manual_seed(config.seed)
            return llama_like(model)

        own = {"out": str(out), "steps": planned["steps"], "dynamics_every": 0, "push_to_hub": None}
        train(replace(config, resume="auto", **own, **resolved), build)
    return planned | read_json_object(out / "result.json")


def write_card(folder, name):
    """Write README.md from `result.json` and `samples.txt` of the folder."""
    result = read_json_object(folder / "result.json")
    metrics, llama, run = result["metrics"], result["llama"], result["run"]
    found = {
        "this model, in bf16": metrics["bits_per_byte"],
        "a Llama of equal size, trained for the same time": llama["metrics"]["bits_per_byte"],
        f"an order-{ORDER} model of bytes, counted on the training stories": metrics[ORDER_KEY],
        "`gzip -9`": metrics["gzip_bits_per_byte"],
    }
    rows = [f"| {name} | {value:.3f} |" for name, value in found.items()]
    (folder / "README.md").write_text(
        CARD.format(
            name=name,
            parameters=run["parameters"] / 1e6,
            train_bytes=run["train_bytes"] / 1e6,
            tokens=run["tokens_trained"] / 1e6,
            passes=run["tokens_trained"] * run["bytes_per_token"] / run["train_bytes"],
            documents=result["n_documents"],
            bytes=result["n_bytes"],
            table="\n".join(["| | bits per byte |", "|---|---|", *rows]),
            steps=run["steps"],
            llama_parameters=llama["parameters"] / 1e6,
            llama_steps=llama["steps"],
            llama_time=llama["time"],
            command=result["command"],
            commit=result["commit"],
            samples=(folder / "samples.txt").read_text(),
        )
    )


def main():
    """Measure, write the folder, print its card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the finished run")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/lm-stories"))
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of step times")
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()

    trained = read_json_object(options.run / "result.json")
    config = with_fields(TrainConfig(), flat(trained["settings"]))
    loaded = load(str(options.run / "model"), device="cpu")
    heldout = list(load_split(config.data, "heldout")["text"])
    stories = list(load_split(config.data, "train")["text"])
    llama = train_llama(
        options.run / "llama", loaded.model, config, trained["resolved"], options.rounds
    )
    assert llama["text_fingerprint"] == trained["text_fingerprint"]

    with atomic_folder(options.out) as folder:
        loaded.model.to(torch.bfloat16).save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        data = read_training_file(options.run / "model")[0]
        source = "text:" + Path(data.source.partition(":")[2]).name  # no folder of this machine
        write_training_file(folder, replace(data, source=source), loaded.tokenizer)
        loaded = load(str(folder), device="cpu")
        measured = evaluate(
            loaded, config.data.source, None, EvalConfig(split="heldout", quiet=True), config.data
        )
        assert measured["text_fingerprint"] == trained["text_fingerprint"]
        (folder / "samples.txt").write_text(sample_lines(loaded, PROMPTS, NEW_TOKENS))
        result = {
            "metrics": measured["metrics"]
            | {
                "gzip_bits_per_byte": gzip_bits_per_byte(heldout),
                ORDER_KEY: ByteModel(stories, ORDER).bits_per_byte(heldout),
            },
            **{
                name: measured[name]
                for name in ("n_documents", "n_tokens", "n_bytes", "text_fingerprint")
            },
            "run": {
                "steps": config.steps,
                "train_bytes": sum(len(text.encode()) for text in stories),
                "bytes_per_token": measured["n_bytes"] / measured["n_tokens"],
                **{
                    name: trained[name]
                    for name in ("parameters", "step", "tokens_trained", "resolved")
                },
            },
            "llama": {
                name: llama[name] for name in ("metrics", "parameters", "steps", "step", "time")
            },
            "command": f"python -m benchmarks.study.stories_checkpoint {options.run.name}",
            "commit": commit(),
            "hardware": hardware(DEVICE),
            "versions": measured["versions"],
            "weights_sha256": measured["weights_sha256"],
        }
        (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        write_card(folder, f"checkpoints/{options.out.name}")
    print((options.out / "README.md").read_text())


if __name__ == "__main__":
    main()
