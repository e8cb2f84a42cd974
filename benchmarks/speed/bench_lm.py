"""Speed of the language model and of Llama: training and greedy decoding, compiled and eager.

One process holds all models, in every dtype; their steps are timed in turn, so that a busy machine
slows all of them alike. Reports medians, and medians of the ratios within rounds: to Llama in the
same dtype, and to the same model in fp32. Training in bf16 is autocast, decoding has weights of
bf16. Llama has the layers, widths and heads of the plain model, and its active parameters except
those of norms. Qwen3 is Llama with QK norm, which our models have too: it shows the cost of QK norm
alone.

    python -m benchmarks.speed.bench_lm --rows benchmarks/results.csv
    python -m benchmarks.speed.bench_lm --tasks train --dtypes bf16 --profile llama plain
"""

import argparse
import copy
import itertools
import statistics

import torch
from benchmarks.common.memory import parameters
from benchmarks.common.results import append_rows, as_rows, format_values
from benchmarks.common.timing import in_turn, profile_of, ratio_of, training_step
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM, StaticCache

from complexity_lm import DeepConfig, DeepForCausalLM

# case: (dynamics_placement, num_experts); the dynamics are the paper's, with its controller
CASES = {"plain": ("none", 0), "dynamics": ("branch", 0), "dynamics+routing": ("branch", 4)}
SHAPE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings",
)  # fmt: skip


def active_parameters(model):
    """Parameters that act on one token."""
    experts = [p for p in model.parameters() if p.ndim == 3]
    return parameters(model) - sum(p.numel() - p[0].numel() for p in experts)


def build_models(preset, overrides, device):
    """Llama and Qwen3, then every case, from one seed."""
    models = {}
    plain = DeepConfig.from_preset(preset, **overrides)
    shape = {name: getattr(plain, name) for name in SHAPE}
    torch.manual_seed(0)
    none = {"bos_token_id": None, "eos_token_id": None}
    models["llama"] = LlamaForCausalLM(LlamaConfig(**shape, **none))
    models["qwen3"] = Qwen3ForCausalLM(Qwen3Config(**shape, **none))
    for case, (placement, experts) in CASES.items():
        config = DeepConfig.from_preset(
            preset, **overrides, dynamics_placement=placement, dynamics_adaptive="token",
            num_experts=experts,
        )  # fmt: skip
        torch.manual_seed(0)
        models[case] = DeepForCausalLM(config)
    return {case: model.to(device) for case, model in models.items()}


def trainer(model, ids, compiled, dtype="fp32"):
    """A function that trains one step."""
    forward = torch.compile(model) if compiled else model

    def loss():
        model.train()
        with torch.autocast(ids.device.type, torch.bfloat16, dtype == "bf16"):
            return forward(ids, labels=ids, use_cache=False).loss

    return training_step(model, loss)


def decoder(model, prompt, new_tokens, compiled, dtype="fp32"):
    """A function that reads a short prompt and decodes greedily into a static cache."""
    if dtype == "bf16":
        model = copy.deepcopy(model).to(torch.bfloat16)
    forward = torch.compile(model) if compiled else model
    length = prompt.shape[1]
    cache = StaticCache(config=model.config, max_cache_len=length + new_tokens)

    @torch.no_grad()
    def decode():
        model.eval()
        cache.reset()
        positions = torch.arange(length, device=prompt.device)[None]
        out = model(prompt, past_key_values=cache, position_ids=positions, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        for place in range(length, length + new_tokens - 1):
            positions = torch.full((1, 1), place, device=prompt.device)
            out = forward(token, past_key_values=cache, position_ids=positions)
            token = out.logits[:, -1:].argmax(-1)

    return decode


def measure(works, tokens, rounds, device):
    """{(case, dtype): {metric: (value, unit)}}, medians over rounds of all works."""
    times = in_turn(works, rounds, device, rotate=True)
    found = {}
    for (case, dtype), own in times.items():
        found[case, dtype] = {
            "speed": (tokens / statistics.median(own), "tokens/s"),
            "speed ratio": (1 / ratio_of(own, times["llama", dtype]), "llama"),
        }
        if dtype != "fp32" and (case, "fp32") in times:
            ratio = 1 / ratio_of(own, times[case, "fp32"])
            found[case, dtype]["over fp32"] = (ratio, "x itself")
    return found


def main():
    """Print one table; `--rows` adds it to the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="50m")
    parser.add_argument("--override", nargs="*", default=[], metavar="FIELD=INT")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tasks", nargs="+", default=["train", "decode"])
    parser.add_argument("--modes", nargs="+", default=["compiled", "eager"])
    parser.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16"], default=["fp32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--profile", nargs="+", metavar="CASE", help="print these profiles only")
    parser.add_argument("--rows", help="CSV to add the rows to")
    options = parser.parse_args()
    pairs = (pair.split("=") for pair in options.override)
    overrides = {name: int(value) for name, value in pairs}
    models = build_models(options.preset, overrides, options.device)
    vocabulary = models["llama"].config.vocab_size
    shape = (options.batch_size, options.length)
    ids = torch.randint(0, vocabulary, shape, device=options.device)

    candidates = list(itertools.product(options.profile or models, options.dtypes))
    prompt, new_tokens = ids[:1, :16], options.new_tokens
    for mode, task in itertools.product(options.modes, options.tasks):
        compiled = mode == "compiled"
        # Each model is another compilation of the same code.
        torch.compiler.reset()
        torch._dynamo.config.recompile_limit = 64
        if task == "train":
            tokens = ids.numel()
            works = {(m, d): trainer(models[m], ids, compiled, d) for m, d in candidates}
        else:
            tokens = new_tokens
            works = {
                (m, d): decoder(models[m], prompt, new_tokens, compiled, d) for m, d in candidates
            }
        if options.profile:
            for (case, dtype), work in works.items():
                print(f"{case}, {task}, {dtype}, {mode}\n{profile_of(work, options.device)}")
            continue
        rows = []
        found = measure(works, tokens, options.rounds, options.device)
        for (case, dtype), values in found.items():
            values["active"] = (active_parameters(models[case]) / 1e6, "M parameters")
            name = f"{options.preset}/{case}/{task}/{mode}"
            print(f"{name:44} {dtype} {format_values(values)}", flush=True)
            rows += as_rows(values, name, dtype=dtype)
        if options.rows:
            append_rows(options.rows, "bench_lm", rows, options.device)


if __name__ == "__main__":
    main()
