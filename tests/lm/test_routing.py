"""Experts of the language model: gradients, balanced loads, one sort per batch, the saved table."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.initialization import no_init_weights

from complexity_lm import DeepForCausalLM, DeepModel
from inl_core.routing import build_routing_table


class Operations(TorchDispatchMode):
    """Records the names of all operations in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("placement", ["branch", "none"])
def test_every_expert_gets_a_gradient_and_changes(tiny, ids, placement) -> None:
    """Experts of the original models had no gradient: their published weights are initial ones."""
    torch.manual_seed(0)
    model = DeepForCausalLM(tiny(num_experts=4, dynamics_placement=placement)).train()
    assert set((ids % 4).flatten().tolist()) == {0, 1, 2, 3}
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    stacks = 0
    for (name, parameter), start in zip(model.named_parameters(), before, strict=True):
        if parameter.ndim == 3:
            stacks += 1
            for expert in range(4):
                assert parameter.grad[expert].abs().max() > 0, (name, expert)
                assert (parameter[expert] - start[expert]).abs().max() > 0, (name, expert)
    assert stacks == 3 * model.config.num_hidden_layers


def test_an_expert_gets_gradients_from_its_own_ids_only(lively, ids) -> None:
    model = lively(num_experts=4).train()
    only = ids - ids % 4 + 2  # ids that all go to expert 2
    model(only.clamp(max=62), labels=only.clamp(max=62)).loss.backward()
    for layer in model.model.layers:
        for stack in (layer.mlp.gate, layer.mlp.up, layer.mlp.down):
            moved = [bool(stack.grad[expert].any()) for expert in range(4)]
            assert moved == [False, False, True, False]


def test_balanced_loads_are_within_one_percent_of_even(tiny) -> None:
    """Counts decrease like 1 / rank, as those of words; the largest share is below 1/E."""
    config = tiny(vocab_size=2000, num_experts=4)
    model = DeepForCausalLM(config)
    counts = (1e6 / torch.arange(1, 2001)).long()[torch.randperm(2000)]
    assert counts.max() < counts.sum() / 4
    model.balance_experts(counts)
    loads = torch.zeros(4).scatter_add_(0, model.model.routing_table, counts.float())
    even = counts.sum() / 4
    assert ((loads - even).abs() / even).max() < 0.01
    assert model.config.routing_scheme == "balanced"
    # Modulo routing of the same corpus is not balanced.
    plain = torch.zeros(4).scatter_add_(0, torch.arange(2000) % 4, counts.float())
    assert ((plain - even).abs() / even).max() > 0.01


def test_an_id_with_too_large_a_share_gives_a_warning(tiny) -> None:
    model = DeepForCausalLM(tiny(num_experts=4))
    counts = torch.ones(64)
    counts[17] = 100
    with pytest.warns(UserWarning, match=r"id 17 "):
        model.balance_experts(counts)


@pytest.mark.parametrize("train", [False, True], ids=["forward", "forward-backward"])
def test_one_sort_per_batch_at_any_depth(lively, ids, train) -> None:
    def run(layers: int) -> list[str]:
        model = lively(num_experts=3, num_hidden_layers=layers).train(train)
        with Operations() as operations:
            out = model(ids, labels=ids, use_cache=False)
            if train:
                out.loss.backward()
        return operations.names

    names = run(layers=5)
    sorting = {"sort", "argsort", "msort", "topk", "unique", "_unique2", "bincount", "histc"}
    sorts = [i for i, name in enumerate(names) if name in sorting]
    assert len(sorts) == 1
    products = [i for i, name in enumerate(names) if "grouped" in name]
    assert len(products) >= 15  # three per layer: the experts did run
    assert sorts[0] < min(products)
    # No layer reads a number from the device.
    read = "_local_scalar_dense"
    assert names.count(read) == run(layers=2).count(read)


def test_all_layers_share_one_saved_table(lively, ids, tmp_path) -> None:
    model = lively(num_experts=3)
    model.balance_experts(torch.rand(64) + 0.1)
    tables = [name for name, buffer in model.named_buffers() if buffer.dtype == torch.long]
    assert tables == ["model.routing_table"]
    model.save_pretrained(tmp_path)
    loaded = DeepForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.model.routing_table, model.model.routing_table)
    assert loaded.config.routing_scheme == "balanced"
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    half = DeepForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(half.model.routing_table, model.model.routing_table)


def test_resizing_the_vocabulary_resizes_the_routing_table(lively, ids, tmp_path) -> None:
    model = lively(num_experts=3)
    model.balance_experts(torch.rand(64) + 0.1)
    before, table = model(ids).logits, model.model.routing_table.clone()
    model.resize_token_embeddings(70, mean_resizing=False)
    assert torch.equal(model.model.routing_table[:64], table)
    assert model.model.routing_table[64:].tolist() == [1, 2, 0, 1, 2, 0]
    torch.testing.assert_close(model(ids).logits[..., :64], before)
    assert model(torch.full_like(ids, 69)).logits.isfinite().all()
    model.save_pretrained(tmp_path)
    assert DeepForCausalLM.from_pretrained(tmp_path).model.routing_table.shape == (70,)
    model.resize_token_embeddings(40)
    assert torch.equal(model.model.routing_table, table[:40])


def test_embeddings_need_routing_ids(lively, ids) -> None:
    routed, dense = lively(num_experts=3), lively()
    embeddings = routed.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match=r"give routing_ids \(B, N\) in addition to inputs_embeds"):
        routed(inputs_embeds=embeddings)
    torch.testing.assert_close(
        routed(inputs_embeds=embeddings, routing_ids=ids).logits, routed(ids).logits
    )
    assert dense(inputs_embeds=embeddings).logits.isfinite().all()


def test_a_table_that_no_weights_fill_is_no_arbitrary_memory(tiny) -> None:
    with no_init_weights():
        assert DeepModel(tiny(num_experts=3)).routing_table.tolist() == [i % 3 for i in range(64)]


def test_virtual_tokens_before_the_ids_are_routed(lively, ids) -> None:
    routed = lively(num_experts=3)
    embeddings = routed.get_input_embeddings()(torch.nn.functional.pad(ids, (4, 0)))
    expected = routed(torch.nn.functional.pad(ids, (4, 0))).logits
    assert torch.equal(routed(inputs_embeds=embeddings, routing_ids=ids).logits, expected)
    with pytest.raises(ValueError, match=r"routing_ids of shape \(3, 15\) must be \(3, 11\)"):
        routed(inputs_embeds=embeddings[:, 4:], routing_ids=torch.nn.functional.pad(ids, (4, 0)))


def test_routing_ids_of_another_shape_or_vocabulary(lively, ids) -> None:
    model = lively(num_experts=3)
    with pytest.raises(ValueError, match=r"routing_ids of shape \(3, 10\) must be \(3, 11\)"):
        model(ids, routing_ids=ids[:, 1:])
    with pytest.raises(ValueError, match="token id 80 is outside the vocabulary of 64 ids"):
        model(ids, routing_ids=torch.full_like(ids, 80))


def test_a_routing_table_of_another_vocabulary(lively, tiny, ids, tmp_path) -> None:
    model = lively(num_experts=3)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"\(64.* in the checkpoint, \(90"):
        DeepForCausalLM.from_pretrained(tmp_path, config=tiny(num_experts=3, vocab_size=90))
    model.model.routing_table = build_routing_table(90, 3)
    with pytest.raises(ValueError, match="table is for 90 token ids, the vocabulary has 64"):
        model(ids)


def test_balancing_needs_experts_and_the_counts_of_the_vocabulary(tiny) -> None:
    with pytest.raises(ValueError, match="num_experts is 0"):
        DeepForCausalLM(tiny()).balance_experts(torch.ones(64))
    with pytest.raises(ValueError, match=r"counts must have shape \(64,\), got \(63,\)"):
        DeepForCausalLM(tiny(num_experts=2)).balance_experts(torch.ones(63))
    with pytest.raises(ValueError, match=r"needs the token counts of a corpus"):
        DeepForCausalLM(tiny(num_experts=2, routing_scheme="balanced"))
