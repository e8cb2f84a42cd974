"""Captions as tokens of the image's sequence, as in the package, or read by cross-attention.

    python -m benchmarks.recipe.text_fusion --latents CACHE --out DIR --rows benchmarks/results.csv

Every arm of `ARMS` trains the same text encoder on the same captions, images and noise of a seed,
by the loop of `complexity-dit train`. `joint` is our network. `cross-attention` has it in every
block between self-attention and the MLP, as PixArt (Chen et al., arXiv 2310.00426), and an MLP that
is narrower by as many parameters; `cross-attention added` keeps the MLP. The condition has the mean
of the text in all of them.

The held-out loss is that of the EMA weights at the end, on the same images, captions, noise and
times for all arms of a seed. The time of a step is measured before, on all networks in turn,
without the text encoder. The same command goes on with what is missing.
"""

import argparse
import csv
import json
from pathlib import Path

import torch
from benchmarks.common.fields import overridden, override_flag
from benchmarks.common.memory import parameters
from benchmarks.common.results import append_rows, as_rows, commit, dtype_of, format_values
from benchmarks.common.timing import DEVICE, paired, training_step
from benchmarks.recipe.recipe import KNOBS, row_config
from benchmarks.study.ablation_report import interval
from torch import nn

from complexity_dit.data.latents import load_training_data
from complexity_dit.models.transformer import ComplexityDiTBlock, ComplexityDiTTransformer2DModel
from complexity_dit.training.network import build_model
from complexity_dit.training.train import train
from inl_core import RMSNorm, ops

HELDOUT_IMAGES = 2048
TEXT_CHANNELS = 128
"""Width of the text encoder that the package trains along, for the times of a step."""


class CrossAttention(nn.Module):
    """Attention from tokens of the image, (B, N, D), to those of the text, (B, T, D)."""

    def __init__(self, hidden_size, heads, eps):
        super().__init__()
        self.heads = heads
        self.norm = RMSNorm(hidden_size, eps=eps)
        self.to_q, self.to_k, self.to_v, self.to_out = (
            nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(4)
        )
        self.norm_q, self.norm_k = (RMSNorm(hidden_size // heads, eps=eps) for _ in range(2))

    def forward(self, x_BND, text_BTD, mask_BT):
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1))
            for projection, x in (
                (self.to_q, self.norm(x_BND)), (self.to_k, text_BTD), (self.to_v, text_BTD),
            )
        )  # fmt: skip
        q, k, v = (x.transpose(1, 2) for x in (self.norm_q(q), self.norm_k(k), v))
        out_BHNE = ops.attention(q, k, v, mask_BT[:, None, None])
        return self.to_out(out_BHNE.transpose(1, 2).flatten(-2))


class CrossAttentionBlock(ComplexityDiTBlock):
    """The plain block with cross-attention before its MLP; the text is set before each call."""

    text = None

    def __init__(self, config):
        if config["dynamics_placement"] != "none":
            raise ValueError("cross-attention is for networks without dynamics")
        super().__init__(config)
        self.cross_attn = CrossAttention(
            config["hidden_size"], config["num_attention_heads"], config["norm_eps"]
        )

    def forward(self, h_BND, v_BND, c_BD, cos_NE, sin_NE, mask_BN=None):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(c_BD).chunk(6, dim=-1)
        branch_BND = self.attn(self.norm1(h_BND, shift1, scale1), cos_NE, sin_NE, mask_BN)
        h_BND = ops.gated_residual(h_BND, branch_BND, gate1)
        h_BND = h_BND + self.cross_attn(h_BND, *self.text)
        branch_BND = self.mlp(self.norm2(h_BND, shift2, scale2))
        return ops.gated_residual(h_BND, branch_BND, gate2), v_BND


class CrossAttentionDiT(ComplexityDiTTransformer2DModel):
    """The network whose tokens of a text are not in the sequence of the image."""

    def _init_weights(self):
        self.blocks = nn.ModuleList(CrossAttentionBlock(self.config) for _ in self.blocks)
        super()._init_weights()
        for block in self.blocks:
            nn.init.zeros_(block.cross_attn.to_out.weight)

    def _embed_text(self, *inputs):
        text_BTD, mask_BT, pooled_BD = super()._embed_text(*inputs)
        for block in self.blocks:
            block.text = text_BTD, mask_BT
        return text_BTD[:, :0], mask_BT[:, :0], pooled_BD

    def _once(self, blocks, state, *inputs):
        *inputs, _ = inputs  # the mask, of a sequence without padding
        return super()._once(blocks, state, *inputs, None)


def build_cross_attention(config, data):
    """The network that `build_model` would make, with cross-attention."""
    shape = dict(build_model(config, data).config)
    torch.manual_seed(config.seed)
    return CrossAttentionDiT.from_config(shape)


# {name: (build, overrides of the model)}. Half of the MLP's width of 8/3 is four square matrices,
# those of cross-attention.
ARMS = {
    "joint": (build_model, {}),
    "cross-attention": (build_cross_attention, {"mlp_ratio": 4 / 3}),
    "cross-attention added": (build_cross_attention, {}),
}


def arm_config(arm, seed, options):
    """The run of one arm: plain flow matching with logit-normal times and a time shift."""
    changes = KNOBS["time-shift"] | {
        "data.source": options.source or f"latents:{options.latents}",
        "data.label_fields": [],
        "data.caption_template": options.caption_template,
        "text_encoder.source": "lm",
        "text_encoder.max_length": 32,
        "optim.warmup_steps": 100,
        "checkpoint_every": 100,
        "keep_last": 1,
        "report_to": "none",
        "noise_bins": 0,
        "heldout_num_images": HELDOUT_IMAGES,
    }
    changes |= overridden(options.override)
    changes["model.overrides"] = changes.get("model.overrides", {}) | ARMS[arm][1]
    out = options.out / f"{arm.replace(' ', '-')}-{seed}" / "run"
    config = row_config("logit-normal", out, options.images, seed, changes)
    config.heldout_every = config.steps
    return config


def held_out_loss(arm, config):
    """The held-out loss of one arm, which is trained if it is not finished."""
    if not (Path(config.out) / "pipeline").exists():
        train(config, ARMS[arm][0])
    with (Path(config.out) / "heldout_log.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    if int(last["step"]) != config.steps:
        raise SystemExit(
            f"{config.out} was trained for {last['step']} steps, not {config.steps}: choose "
            "another --out"
        )
    return float(last["loss"])


def step_times(options):
    """Seconds of a training step, its ratio to the first arm, and parameters, of each arm."""
    steps, sizes = {}, {}
    for arm, (build, _) in ARMS.items():
        config = arm_config(arm, 0, options)
        config.model.overrides["caption_channels"] = TEXT_CHANNELS
        data = load_training_data(config.data)
        network = build(config, data).to(DEVICE).train()
        batch, side = config.batch_size, data.sample_size
        inputs = (
            torch.randn(batch, data.channels, side, side, device=DEVICE),
            1000 * torch.rand(batch, device=DEVICE),
        )
        text = torch.randn(batch, options.text_tokens, TEXT_CHANNELS, device=DEVICE)
        mask = torch.ones(batch, options.text_tokens, dtype=torch.bool, device=DEVICE)

        def loss(network=network, inputs=inputs, text=text, mask=mask):
            options = {"encoder_hidden_states": text, "encoder_attention_mask": mask}
            return network(*inputs, return_dict=False, **options)[0].square().mean()

        steps[arm] = training_step(network, loss, clip=True)
        sizes[arm] = parameters(network)
    times = paired(steps, options.rounds, DEVICE)
    return {arm: (*times[arm], sizes[arm]) for arm in ARMS}


def main():
    """Train what is missing and print the losses; `--rows` adds them to the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--latents", help="cache written by complexity-dit encode")
    source.add_argument("--source", help="a source of images, for training in pixels")
    parser.add_argument("--caption_template", default="{style} {genre} by {artist}: {title}")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=10_000, help="training images of an arm")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--text_tokens", type=int, default=24, help="of a caption, for the times")
    parser.add_argument("--rounds", type=int, default=15, help="of the times of a step")
    parser.add_argument("--override", nargs="*", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--rows", help="CSV to add the rows to")
    options = parser.parse_args()

    started_from, rows, losses = commit(), [], {arm: [] for arm in ARMS}
    shared = {}
    for arm, (seconds, ratio, count) in step_times(options).items():
        config = arm_config(arm, 0, options)
        values = {
            "parameters": (count, ""),
            "speed of a step": (config.batch_size / seconds, "images/s"),
            "time of a step": (ratio, f"x {next(iter(ARMS))}"),
        }
        print(f"{arm}: {format_values(values)}", flush=True)
        shared = {"dtype": dtype_of(config.mixed_precision)}
        rows += as_rows(values, arm, shape=f"{options.text_tokens} tokens of text", **shared)
    for seed in options.seeds:
        for arm in ARMS:
            loss = held_out_loss(arm, arm_config(arm, seed, options))
            losses[arm].append(loss)
            print(f"{arm}, seed {seed}: held-out loss {loss:.5f}", flush=True)
            shape = f"seed {seed}, {options.images} images"
            rows += as_rows({"held-out loss": (loss, "")}, arm, shape=shape, **shared)
    base, *others = ARMS
    for arm in others:
        apart = [own - first for own, first in zip(losses[arm], losses[base], strict=True)]
        middle, half = interval(apart)
        values = {"difference": (middle, "")}
        if half is not None:
            values["half width of its 95 % interval"] = (half, "")
        print(f"{arm} - {base}: {format_values(values)}")
        shape = f"{len(options.seeds)} seeds, {options.images} images"
        rows += as_rows(values, f"{arm} - {base}", shape=shape, **shared)
    if options.rows:
        template = json.dumps(options.caption_template)
        command = (
            f"python -m benchmarks.recipe.text_fusion --images {options.images} --seeds "
            f"{' '.join(map(str, options.seeds))} --caption_template {template}"
            + override_flag(options.override)
        )
        append_rows(options.rows, "text_fusion", rows, DEVICE, command=command, commit=started_from)


if __name__ == "__main__":
    main()
