"""Speed of the language model and of Llama: training and greedy decoding, compiled and eager.

One process holds all models; their steps are timed in turn, so that a busy machine slows all of
them alike. Reports medians, and the median of the ratios to Llama within rounds. Llama has the
layers, widths and heads of the plain model, and its active parameters except those of norms. Qwen3
is Llama with QK norm, which our models have too: it shows the cost of QK norm alone.

    python -m benchmarks.speed.bench_lm --rows benchmarks/results.csv
"""

import argparse

import torch
from benchmarks.common.memory import parameters
from benchmarks.common.results import append_rows, as_rows
from benchmarks.common.timing import paired, training_step
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


def trainer(model, ids, compiled):
    """A function that trains one step."""
    forward = torch.compile(model) if compiled else model

    def loss():
        model.train()
        return forward(ids, labels=ids, use_cache=False).loss

    return training_step(model, loss)


def decoder(model, prompt, new_tokens, compiled):
    """A function that reads a short prompt and decodes greedily into a static cache."""
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
    """{case: (tokens/s, ratio to Llama)}, medians over paired rounds."""
    times = paired(works, rounds, device, rotate=True)
    return {case: (tokens / seconds, 1 / ratio) for case, (seconds, ratio) in times.items()}


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
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", help="CSV to add the rows to")
    options = parser.parse_args()
    pairs = (pair.split("=") for pair in options.override)
    overrides = {name: int(value) for name, value in pairs}
    models = build_models(options.preset, overrides, options.device)
    vocabulary = models["llama"].config.vocab_size
    shape = (options.batch_size, options.length)
    ids = torch.randint(0, vocabulary, shape, device=options.device)

    for mode in options.modes:
        compiled = mode == "compiled"
        tasks = {
            "train": (
                {case: trainer(model, ids, compiled) for case, model in models.items()},
                ids.numel(),
            ),
            "decode": (
                {
                    case: decoder(model, ids[:1, :16], options.new_tokens, compiled)
                    for case, model in models.items()
                },
                options.new_tokens,
            ),
        }
        for task in options.tasks:
            works, tokens = tasks[task]
            torch.compiler.reset()  # all models together exceed the limit of recompilations
            rows = []
            for case, (speed, ratio) in measure(
                works, tokens, options.rounds, options.device
            ).items():
                millions = active_parameters(models[case]) / 1e6
                name = f"{options.preset}/{case}/{task}/{mode}"
                print(f"{name:44} {millions:7.1f}M active {speed:10.1f} tokens/s {ratio:6.3f}x")
                values = {
                    "speed": (speed, "tokens/s"),
                    "speed ratio": (ratio, "llama"),
                    "active": (millions, "M parameters"),
                }
                rows += as_rows(values, name, dtype="")
            if options.rows:
                append_rows(options.rows, "bench_lm", rows, options.device)


if __name__ == "__main__":
    main()
