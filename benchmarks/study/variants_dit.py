"""The image model with dynamics in other places or of other kinds.

A variant is a class, because the training loop copies a network by its class and config. Its
pipeline folders must be loaded with this class (`varied_dit(swap).from_pretrained(folder /
"transformer")`); otherwise they give the plain network with the same weights.
"""

import copy
from functools import cache

import torch
from benchmarks.study.loop_arms import LoopArm
from benchmarks.study.loops_report import ARMS
from benchmarks.study.variants import SWAPS

from complexity_dit.models.transformer import ComplexityDiTBlock, ComplexityDiTTransformer2DModel
from complexity_dit.training.network import build_model


class _Branches(ComplexityDiTBlock):
    """Placement `branch` on attention, the MLP or both, with one velocity."""

    on_attention, on_mlp = True, True

    def forward(self, h_BND, v_BND, c_BD, cos_NE, sin_NE, mask_BN=None):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(c_BD).chunk(6, dim=-1)
        normed_BND = self.norm1(h_BND, shift1, scale1)
        branch_BND = self.attn(normed_BND, cos_NE, sin_NE, mask_BN)
        if self.on_attention:
            branch_BND, v_BND = self.dynamics(branch_BND, v_BND)
        h_BND = h_BND + gate1[:, None] * branch_BND
        branch_BND = self.mlp(self.norm2(h_BND, shift2, scale2))
        if self.on_mlp:
            dynamics = self.dynamics_mlp if self.on_attention else self.dynamics
            branch_BND, v_BND = dynamics(branch_BND, v_BND)
        return h_BND + gate2[:, None] * branch_BND, v_BND


class MLPBranch(_Branches):
    on_attention = False


class BothBranches(_Branches):
    pass


class AcrossBlocks(ComplexityDiTBlock):
    """Momentum across blocks only: the force is the change made by the whole plain block."""

    def forward(self, h_BND, v_BND, *inputs):
        after_BND, _ = super().forward(h_BND, None, *inputs)
        return self.dynamics(h_BND, v_BND, force=after_BND - h_BND)


def _needs(model, placement):
    if model.config.dynamics_placement != placement:
        raise ValueError(
            f"this swap is for placement {placement}, not {model.config.dynamics_placement}"
        )


def mlp_branch(model):
    _needs(model, "branch")
    for block in model.blocks:
        block.__class__ = MLPBranch


def both_branches(model):
    _needs(model, "branch")
    for block in model.blocks:
        block.dynamics_mlp = copy.deepcopy(block.dynamics)
        block.__class__ = BothBranches


def across_blocks(model):
    _needs(model, "stream")
    for block in model.blocks:
        block.placement = "none"  # of the inner block; AcrossBlocks adds the dynamics around it
        block.__class__ = AcrossBlocks


def loop_arm(arm):
    """A variant that repeats the blocks of the loop in another manner."""

    def swap(model):
        if not hasattr(model, "dynamics_loop"):
            raise ValueError("the network has no loop with dynamics to replace: set num_loops")
        config = model.config
        model.dynamics_loop = LoopArm(arm, config["hidden_size"], config["num_loops"])

    return swap


DIT_SWAPS = {
    **{name: lambda model, swap=swap: swap(model.blocks) for name, swap in SWAPS.items()},
    "mlp-branch": mlp_branch,
    "both-branches": both_branches,
    "across-blocks": across_blocks,
    **{f"loop, {arm}": loop_arm(arm) for arm in ARMS},
}


@cache
def varied_dit(swap):
    """The class of networks with `swap` applied; None is the unchanged class."""
    if swap is None:
        return ComplexityDiTTransformer2DModel
    if swap not in DIT_SWAPS:
        raise ValueError(f"unknown swap {swap!r}, choose from: {', '.join(DIT_SWAPS)}")

    class VariedDiT(ComplexityDiTTransformer2DModel):
        def _init_weights(self):
            super()._init_weights()
            DIT_SWAPS[swap](self)

    return VariedDiT


def varied_build(swap):
    """A build function for `train`: the network of the config with `swap` applied."""
    kind = varied_dit(swap)

    def build(config, data):
        shape = dict(build_model(config, data).config)
        torch.manual_seed(config.seed)  # the random numbers of the plain network
        return kind.from_config(shape)

    return build_model if swap is None else build
