"""Speed of the image model and of diffusers' DiT of equal width, depth and tokens.

One process holds all models, in every dtype and mode; their steps are timed in turn, so that a busy
machine slows all of them alike. Reports medians, and medians of the ratios within rounds: to DiT in
the same dtype and mode, to DiT in its fastest one, and to the same model in fp32. A step of
training is forward, backward, clipping and AdamW, in bf16 under autocast. Sampling (`--task
sample`) is 20 evaluations of the network with a step of the Euler scheduler after each, in bf16
with weights of bf16. `none` has the named size; with equal parameters it has a wider MLP.
diffusers' DiT has an embedding of time and label in every block, which runs once per image, a wider
MLP runs once per token, so the FLOPs of a step are reported as well, as torch counts them. Dropping
half of the tokens is compared with the same model on all tokens, and a model that reads prompts of
24 tokens by a small complexity-lm model, which is trained along, with the one that has a label in
their place; sampling reads a prompt once. Peak memory is the growth of a
fresh process with one model, eager.

    python -m benchmarks.speed.bench_dit --rows benchmarks/results.csv
    python -m benchmarks.speed.bench_dit --task sample --batch_size 8 --dtypes fp32 bf16
    python -m benchmarks.speed.bench_dit --profile dynamics [--attention native]
"""

import argparse
import bisect
import itertools
import multiprocessing
import statistics

import torch
from benchmarks.common.diffusers_dit import DiffusersDiT
from benchmarks.common.memory import of_process, parameters
from benchmarks.common.results import append_rows, as_rows, format_values
from benchmarks.common.timing import in_turn, profile_of, ratio_of, training_step
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.utils.flop_counter import FlopCounterMode

from complexity_dit.config import TextEncoderConfig
from complexity_dit.models.text import outline_text_encoder, text_width
from complexity_dit.models.tokens import draw_kept_tokens
from complexity_dit.models.transformer import SIZES, ComplexityDiTTransformer2DModel
from complexity_dit.training.text import PromptedNetwork, encode_tokens

LABELS = {"label_fields": ["style"], "num_classes": [8]}
TEXT = TextEncoderConfig("lm", bidirectional=True, max_length=24)
DYNAMICS = {"dynamics_placement": "branch", "dynamics_adaptive": "channel"}
# case: (changes of our model or None for diffusers', whether half of the tokens are dropped)
CASES = {
    "diffusers": (None, False),
    "none": ({"dynamics_placement": "none"}, False),
    "none, equal parameters": ({"dynamics_placement": "none", "mlp_ratio": "equal"}, False),
    "dynamics": (DYNAMICS, False),
    "dynamics, equal parameters": (DYNAMICS | {"mlp_ratio": "equal"}, False),
    "none, prompts": ({"dynamics_placement": "none", "label_fields": [], "num_classes": []}, False),
    "none, half the tokens": ({"dynamics_placement": "none"}, True),
    "dynamics, half the tokens": (DYNAMICS, True),
}
ITSELF = {"none, half the tokens": "none", "dynamics, half the tokens": "dynamics"}


def build(case, options):
    """The network of a case from one seed, with random numbers in layers initialised to zero."""
    torch.manual_seed(0)
    hidden, layers, heads = SIZES[options.size]
    shape = {
        "sample_size": options.cells, "patch_size": options.patch, "in_channels": options.channels,
        "hidden_size": hidden, "num_layers": layers, "num_attention_heads": heads, **LABELS,
    }  # fmt: skip
    changes, _ = CASES[case]
    if changes is None:
        model = DiffusersDiT(**shape)
    else:
        if changes.get("mlp_ratio") == "equal":
            changes = changes | {"mlp_ratio": equal_ratio(shape, options)}
        encoder = outline_text_encoder(TEXT) if changes.get("label_fields") == [] else None
        width = {"caption_channels": text_width(encoder)} if encoder else {}
        model = ComplexityDiTTransformer2DModel(**shape | changes | width)
        if options.attention:
            model.set_attention_backend(options.attention)
        if encoder:
            model = PromptedNetwork(model, encoder)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model.to(options.device)


def equal_ratio(shape, options):
    """The MLP ratio, in steps of 64 units, at which our model has the parameters of DiT."""
    wanted = parameters(build("diffusers", options))

    def count(ratio):
        with torch.device("meta"):
            return parameters(
                ComplexityDiTTransformer2DModel(**shape, dynamics_placement="none", mlp_ratio=ratio)
            )

    ratios = [64 * k / shape["hidden_size"] for k in range(1, shape["hidden_size"])]
    above = bisect.bisect_left(ratios, wanted, key=count)
    return min(ratios[max(above - 1, 0) : above + 1], key=lambda r: abs(count(r) - wanted))


def inputs_of(model, options):
    """A batch of noise, times and labels, and the tokens of prompts of a model that reads them."""
    batch, device = options.batch_size, options.device
    x = torch.randn(batch, options.channels, options.cells, options.cells, device=device)
    t = torch.rand(batch, device=device) * 1000
    if not isinstance(model, PromptedNetwork):
        return x, t, torch.randint(8, (batch, 1), device=device), {}
    rows = model.text_encoder.config.vocab_size
    ids = torch.randint(rows, (batch, TEXT.max_length), device=device)
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids, dtype=torch.bool)}
    return x, t, torch.empty(batch, 0, dtype=torch.long, device=device), text


def stepper(case, options, compiled, dtype="fp32"):
    """A function that trains for one step, and its model."""
    model = build(case, options)
    forward = torch.compile(model) if compiled else model
    batch, device = options.batch_size, options.device
    x, t, labels, text = inputs_of(model, options)
    tokens = (options.cells // options.patch) ** 2
    draw = torch.Generator().manual_seed(0)

    def loss():
        kept = {}
        if CASES[case][1]:
            kept["kept_tokens"] = draw_kept_tokens(batch, tokens, 0.5, draw).to(device)
        autocast = torch.autocast(torch.device(device).type, torch.bfloat16, dtype == "bf16")
        with autocast:
            out = forward(x, t, labels, return_dict=False, **kept, **text)[0]
        return torch.nn.functional.mse_loss(out.float(), x)

    return training_step(model, loss, clip=True), model


def sampler(case, options, compiled, dtype="fp32"):
    """A function that denoises one batch in 20 steps, and its model."""
    model = build(case, options).eval()
    if dtype == "bf16":
        model = model.to(torch.bfloat16)
    network = getattr(model, "network", model)
    forward = torch.compile(network) if compiled else network
    noise, _, labels, text = inputs_of(model, options)
    noise, batch, device = noise.to(network.dtype), options.batch_size, options.device
    scheduler = FlowMatchEulerDiscreteScheduler()

    @torch.inference_mode()
    def sample():
        scheduler.set_timesteps(20, device=device)
        x, read = noise, {}
        if text:
            ids, mask = text.values()
            rows = zip(ids.split(1), mask.split(1), strict=True)  # as the pipeline encodes prompts
            states = [encode_tokens(model.text_encoder, *row) for row in rows]
            read = {"encoder_hidden_states": torch.cat(states), "encoder_attention_mask": mask}
        for t in scheduler.timesteps:
            out = forward(x, t.expand(batch), labels, return_dict=False, **read)[0]
            x = scheduler.step(out, t, x, return_dict=False)[0]

    return sample, model


TASKS = {"train": stepper, "sample": sampler}


def step_gflops(case, options):
    """GFLOPs per image of a training step, as torch counts them."""
    step, _ = stepper(case, options, compiled=False)
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / options.batch_size / 1e9


def peak_memory(case, options):
    """MiB that training the case adds to this process, which must be a fresh one."""
    if torch.device(options.device).type == "cuda":
        step, _ = stepper(case, options, compiled=False)
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 2**20
    torch.set_num_threads(options.threads)
    before = of_process("VmRSS")
    step, _ = stepper(case, options, compiled=False)
    for _ in range(2):
        step()
    return of_process("VmHWM") - before


def measure(options):
    """{(case, dtype, mode): {metric: (value, unit)}}, medians over rounds of all of them."""
    # Each model is another compilation of the same code.
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = 64
    make = TASKS[options.task]
    candidates = itertools.product(options.cases, options.dtypes, options.modes)
    steps = {key: make(key[0], options, key[2] == "compiled", key[1])[0] for key in candidates}
    times = in_turn(steps, options.rounds, options.device, rotate=True)
    theirs = [key for key in times if key[0] == "diffusers"]
    best = min(theirs, key=lambda key: statistics.median(times[key]), default=None)
    found = {}
    for (case, dtype, mode), own in times.items():
        values = {"speed": (options.batch_size / statistics.median(own), "images/s")}
        bases = {
            ("speed ratio", "x diffusers"): ("diffusers", dtype, mode),
            ("over its fastest mode", "x diffusers"): best if len(theirs) > 1 else None,
            ("over fp32", "x itself"): (case, "fp32", mode) if dtype != "fp32" else None,
            ("over all tokens", "x itself"): (ITSELF.get(case), dtype, mode),
            ("speed ratio", "x labels"): ("none", dtype, mode) if "prompts" in case else None,
        }
        for (metric, unit), base in bases.items():
            if base in times:
                values[metric] = (1 / ratio_of(own, times[base]), unit)
        found[case, dtype, mode] = values
    if best:
        print(f"diffusers' DiT is fastest in {best[1]}, {best[2]}")
    return found


def main():
    """Print one table; `--rows` adds it to the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="tiny", choices=SIZES)
    parser.add_argument("--cells", type=int, default=16, help="side of the input")
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--patch", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--task", choices=TASKS, default="train")
    parser.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16"], default=["fp32"])
    parser.add_argument("--modes", nargs="+", default=["compiled", "eager"])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--attention", help="backend of diffusers for our models, e.g. native")
    parser.add_argument("--profile", choices=CASES, help="print a profile of this case only")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", help="CSV to add the rows to")
    options = parser.parse_args()
    options.threads = torch.get_num_threads()
    if options.profile:
        for dtype, mode in itertools.product(options.dtypes, options.modes):
            step, _ = TASKS[options.task](options.profile, options, mode == "compiled", dtype)
            table = profile_of(step, options.device)
            print(f"{options.profile}, {dtype}, {mode}\n{table}")
        return

    shape = (
        f"{options.size}/{options.patch} {options.batch_size}x{options.channels}x"
        f"{options.cells}x{options.cells}"
    )
    about = {}
    spawn = multiprocessing.get_context("spawn")
    for case in options.cases:
        about[case] = {"parameters": (parameters(build(case, options)), "")}
        if options.task == "train":
            about[case]["work of a step"] = (step_gflops(case, options), "GFLOP/image")
            with spawn.Pool(1) as one:
                memory = one.apply(peak_memory, (case, options))
            about[case]["peak memory, eager"] = (memory, "MiB")
    rows = []
    for (case, dtype, mode), values in measure(options).items():
        values |= about[case]
        name = f"{case}, {mode}" if options.task == "train" else f"{case}, sampling, {mode}"
        print(f"{mode:9} {dtype} {case:26} {format_values(values)}", flush=True)
        rows += as_rows(values, name, shape=shape, dtype=dtype)
    if options.rows:
        append_rows(options.rows, "bench_dit", rows, options.device)


if __name__ == "__main__":
    main()
