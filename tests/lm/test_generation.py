"""transformers' ways of generating, with dense and routed models."""

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    pipeline,
)

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@pytest.fixture
def tokenizer(words) -> PreTrainedTokenizerFast:
    """A tokenizer with sixty-two words, an end and a padding token."""
    names = (f"w{i}" for i in range(2, 64))
    return words("<pad>", "<eos>", *names, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(params=[0, 3], ids=["dense", "routed"])
def model(request, lively):
    return lively(num_experts=request.param, eos_token_id=1)


def greedy_by_definition(model, ids: torch.Tensor, count: int) -> torch.Tensor:
    """The definition: one full forward per token, without cache."""
    for _ in range(count):
        with torch.no_grad():
            following = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], dim=1)
    return ids


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_greedy_generation_is_the_argmax_of_the_full_forward(model, ids, cache) -> None:
    how = {"use_cache": False} if cache == "none" else {"cache_implementation": cache}
    got = model.generate(ids, max_new_tokens=8, eos_token_id=None, do_sample=False, **how)
    assert torch.equal(got, greedy_by_definition(model, ids, 8))


def test_a_batch_of_mixed_lengths_equals_single_texts(model, ids) -> None:
    """Eight texts of different lengths, padded on the left."""
    generator = torch.Generator().manual_seed(3)
    lengths = [1, 2, 3, 5, 7, 8, 11, 13]
    texts = [torch.randint(2, 64, (n,), generator=generator) for n in lengths]
    batch, mask = torch.zeros(8, 13, dtype=torch.long), torch.zeros(8, 13, dtype=torch.long)
    for row, text in enumerate(texts):
        batch[row, -len(text) :] = text
        mask[row, -len(text) :] = 1
    together = model.double().generate(batch, attention_mask=mask, **GREEDY)
    for row, text in enumerate(texts):
        alone = model.generate(text[None], attention_mask=torch.ones(1, len(text)), **GREEDY)
        assert torch.equal(together[row, -6:], alone[0, -6:]), lengths[row]


def test_sampling_depends_on_the_seed_and_follows_the_distribution(model, ids) -> None:
    def sample(seed: int, **how) -> torch.Tensor:
        torch.manual_seed(seed)
        return model.generate(ids, max_new_tokens=8, do_sample=True, **how)

    assert torch.equal(sample(0, top_k=20), sample(0, top_k=20))
    assert not torch.equal(sample(0), sample(1))
    assert torch.equal(sample(0, top_k=1), model.generate(ids, max_new_tokens=8, do_sample=False))

    # 2000 samples of one token against the softmax.
    torch.manual_seed(0)
    drawn = model.generate(ids[:1].expand(2000, -1), max_new_tokens=1, do_sample=True, top_k=0)
    share = torch.bincount(drawn[:, -1], minlength=64) / 2000
    with torch.no_grad():
        wanted = model(ids[:1]).logits[0, -1].softmax(-1)
    assert (share - wanted).abs().sum() < 0.2  # about 0.11 by chance, at least 1 for another text


def test_beam_search_finds_a_better_text_than_greedy(model, ids) -> None:
    def log_likelihood(text: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scores = model(text).logits[:, ids.shape[1] - 1 : -1].log_softmax(-1)
        return scores.gather(-1, text[:, ids.shape[1] :, None]).sum((1, 2))

    greedy = log_likelihood(model.generate(ids, **GREEDY))
    out = model.generate(
        ids, **GREEDY, num_beams=4, return_dict_in_generate=True, output_scores=True
    )
    beam = log_likelihood(out.sequences)
    # The score summed over cached, reordered steps equals that of one full forward.
    torch.testing.assert_close(out.sequences_scores * 6, beam, rtol=1e-4, atol=1e-4)
    assert (beam >= greedy - 1e-4).all()
    assert (beam > greedy + 1e-3).any()


def test_assisted_decoding_gives_the_greedy_text(model, lively, ids) -> None:
    assistant = lively(num_hidden_layers=1, eos_token_id=1)
    how = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    want = model.generate(ids[:1], **how)
    assert torch.equal(model.generate(ids[:1], assistant_model=assistant, **how), want)
    assert torch.equal(model.generate(ids[:1], prompt_lookup_num_tokens=3, **how), want)


def test_generation_from_embeddings(model, ids) -> None:
    embeddings = model.get_input_embeddings()(ids)
    want = model.generate(ids, **GREEDY)[:, ids.shape[1] :]
    for beams in (1, 2):
        got = model.generate(inputs_embeds=embeddings, routing_ids=ids, num_beams=beams, **GREEDY)
        if beams == 1:
            assert torch.equal(got, want)
        else:
            alike = model.generate(ids, num_beams=beams, **GREEDY)[:, ids.shape[1] :]
            assert torch.equal(got, alike)
    if model.config.num_experts:
        with pytest.raises(ValueError, match="give routing_ids"):
            model.generate(inputs_embeds=embeddings, **GREEDY)


def test_routing_ids_may_differ_from_the_input_ids(lively, ids) -> None:
    model = lively(num_experts=3).double()
    other = ids.roll(1, dims=1)
    how = {"max_new_tokens": 5, "do_sample": False}
    want = ids
    for step in range(5):
        route = torch.cat([other, want[:, ids.shape[1] :]], dim=1)
        with torch.no_grad():
            logits = model(want, routing_ids=route, use_cache=False).logits[:, -1]
        want = torch.cat([want, logits.argmax(-1, keepdim=True)], dim=1)
        assert want.shape[1] == ids.shape[1] + step + 1
    assert not torch.equal(want, model.generate(ids, **how))
    for extra in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(ids, routing_ids=other, **how, **extra), want)


class ForbidEven(LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, ::2] = -float("inf")
        return scores


class AfterFour(StoppingCriteria):
    def __init__(self, start: int) -> None:
        self.end = start + 4

    def __call__(self, input_ids, scores, **kwargs):
        done = input_ids.shape[1] >= self.end
        return torch.full((input_ids.shape[0],), done, dtype=torch.bool)


def test_logits_processors_and_stopping_criteria(model, ids) -> None:
    odd = model.generate(
        ids, max_new_tokens=6, do_sample=False, logits_processor=LogitsProcessorList([ForbidEven()])
    )[:, ids.shape[1] :]
    assert ((odd % 2 == 1) | (odd == 0)).all()  # 0 is padding after the end

    stop = StoppingCriteriaList([AfterFour(ids.shape[1])])
    how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert model.generate(ids, stopping_criteria=stop, **how).shape[1] == ids.shape[1] + 4

    text = model.generate(ids[:1], **how)
    third = int(text[0, ids.shape[1] + 2])
    first = text[0, ids.shape[1] :].tolist().index(third)
    ended = model.generate(ids[:1], max_new_tokens=12, do_sample=False, eos_token_id=third)
    assert torch.equal(ended, text[:, : ids.shape[1] + first + 1])

    banned = model.generate(ids[:1], suppress_tokens=[third], **how)
    assert third not in banned[0, ids.shape[1] :].tolist()
    penalised = model.generate(ids[:1], repetition_penalty=50.0, **how)
    fresh = penalised[0, ids.shape[1] :]
    assert fresh.unique().numel() == fresh.numel()


def test_streaming_and_the_text_generation_pipeline(model, tokenizer) -> None:
    prompt = "w5 w9 w33"
    how = {"max_new_tokens": 6, "do_sample": False}
    encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    want = tokenizer.decode(model.generate(**encoded, **how)[0, 3:], skip_special_tokens=True)

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**encoded, **how, streamer=streamer)
    pieces = list(streamer)
    assert len(pieces) >= 4
    assert "".join(pieces).split() == want.split()

    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    out = generate(prompt, return_full_text=False, **how)
    assert out[0]["generated_text"].split() == want.split()
    batch = generate([prompt, "w7", "w8 w8 w2 w3"], batch_size=3, return_full_text=False, **how)
    assert batch[0][0]["generated_text"].split() == want.split()
