"""Two processes with half of every matrix each compute, train and save like one."""

from pathlib import Path

import pytest
from transformers.distributed.parallel_utils import _get_parameter_plan

from support.processes import torchrun

KINDS = [
    {"dynamics_placement": "branch", "intermediate_size": 49},
    {"dynamics_placement": "force", "num_experts": 3, "intermediate_size": 49},
    {"num_experts": 3, "shared_intermediate_size": 0},
    {"tie_word_embeddings": False, "dynamics_adaptive": "channel", "num_loops": 2},
]

WORKER = """
import sys
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
import complexity_lm

dist.init_process_group("gloo")
for number in range(int(sys.argv[2])):
    folder = f"{sys.argv[1]}/{number}"
    alone = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    shared = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, distributed_config=DistributedConfig(tp_plan="auto")
    )
    parts = {name: p for name, p in shared.named_parameters() if isinstance(p, DTensor)}
    whole = sum(p.numel() for n, p in shared.named_parameters() if n not in parts)
    assert sum(p.to_local().numel() for p in parts.values()) < 0.6 * sum(
        p.numel() for p in parts.values()
    )
    ids = torch.arange(1, 23).reshape(2, 11)
    with torch.no_grad():
        expected = alone(ids).logits
        torch.testing.assert_close(shared(ids).logits, expected)
        words = alone.generate(ids, max_new_tokens=6, do_sample=False)
        assert torch.equal(shared.generate(ids, max_new_tokens=6, do_sample=False), words)
    for model in (alone, shared):
        model.train()(ids, labels=ids, use_cache=False).loss.backward()
    for (name, one), two in zip(alone.named_parameters(), shared.parameters(), strict=True):
        grad = two.grad.full_tensor() if isinstance(two.grad, DTensor) else two.grad
        torch.testing.assert_close(grad, one.grad, msg=name)
    shared.save_pretrained(folder + "-again")
    again = AutoModelForCausalLM.from_pretrained(folder + "-again").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, expected)
    with pytest.raises(ValueError, match="tp_size 2 must divide num_key_value_heads 1"):
        AutoModelForCausalLM.from_pretrained(
            folder, num_key_value_heads=1, ignore_mismatched_sizes=True,
            distributed_config=DistributedConfig(tp_size=2),
        )
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("settings", KINDS)
def test_the_plan_shares_every_matrix_but_those_of_the_dynamics(lively, settings) -> None:
    model = lively(**settings)
    plan = model.tp_plan
    parameters = {name for name, p in model.named_parameters() if p.ndim > 1}
    shared = {name for name in parameters if _get_parameter_plan(name, plan) is not None}
    assert {name for name in parameters - shared if "dynamics" not in name} == set()
    modules = {name for name, _ in model.named_modules()}
    names = modules | {name for name, _ in model.named_parameters()}
    for rule in plan:
        assert any(_get_parameter_plan(name, {rule: ""}) is not None for name in names), rule


@pytest.mark.slow
def test_two_processes_compute_train_and_save_like_one(lively, tmp_path: Path) -> None:
    for number, settings in enumerate(KINDS):
        lively(**settings).double().save_pretrained(tmp_path / str(number))
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    torchrun(2, script, tmp_path, len(KINDS))
