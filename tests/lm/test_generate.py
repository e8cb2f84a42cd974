"""Generation: the same text alone, streamed and in a batch; invalid prompts and options."""

import io
import json
import shutil

import pytest
import torch

from complexity_lm.config import SHIPPED, GenerateConfig
from complexity_lm.generate import encode_prompt, generate, print_generated, read_prompts
from complexity_lm.loading import load
from inl_core.run.errors import UserError
from support.processes import python

GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def loaded(trained):
    return load(str(trained))


@pytest.fixture(scope="module")
def prompts(texts):
    text = (texts / "00.txt").read_text()
    return [text[:9], text[20:23], text[40:54]]


def flat(texts):
    return [text for group in texts for text in group]


def test_greedy_decoding_takes_the_largest_logit(loaded, prompts):
    ids = encode_prompt(loaded, prompts[0])
    assert ids[0] == loaded.tokenizer.eos_token_id
    for _ in range(8):
        with torch.no_grad():
            ids.append(int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax()))
    expected = loaded.tokenizer.decode(ids, skip_special_tokens=True)
    assert flat(generate(loaded, prompts[:1], GREEDY)) == [expected]
    assert expected.startswith(prompts[0])


def test_a_batch_of_mixed_lengths_equals_single_prompts(loaded, prompts):
    alone = [flat(generate(loaded, [prompt], GREEDY))[0] for prompt in prompts]
    assert flat(generate(loaded, prompts, GREEDY)) == alone
    pairs = GenerateConfig(batch_size=2)
    assert flat(generate(loaded, prompts, GREEDY, pairs)) == alone


def test_streaming_prints_the_same_text(loaded, prompts, capsys):
    (text,) = flat(generate(loaded, prompts[:1], GREEDY))
    print_generated(loaded, prompts[:1], GREEDY, GenerateConfig())
    assert capsys.readouterr().out == text + "\n"
    print_generated(loaded, prompts[:1], GREEDY, GenerateConfig(only_new=True))
    assert capsys.readouterr().out == text.removeprefix(prompts[0]) + "\n"
    assert flat(generate(loaded, prompts[:1], GREEDY, GenerateConfig(only_new=True))) == [
        text.removeprefix(prompts[0])
    ]


def test_sampling_depends_on_the_seed(loaded, prompts):
    sampled = {"max_new_tokens": 12, "do_sample": True, "temperature": 1.5}
    first, again, other = (
        flat(generate(loaded, prompts, sampled, GenerateConfig(seed=seed))) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_transformers_options_reach_generate(loaded, prompts):
    beams = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2}
    (group,) = generate(loaded, prompts[:1], beams)
    assert len(group) == 2
    assert group[0] != group[1]
    (plain,) = flat(generate(loaded, prompts[:1], GREEDY, GenerateConfig(only_new=True)))
    stopped = flat(generate(loaded, prompts[:1], GREEDY | {"stop_strings": plain[:4]}))[0]
    assert stopped.endswith(plain[:4])
    assert len(stopped) < len(prompts[0] + plain)
    looked_up = flat(generate(loaded, prompts[:1], GREEDY | {"prompt_lookup_num_tokens": 2}))
    assert looked_up == [prompts[0] + plain]


def test_assisted_decoding_gives_the_greedy_text(loaded, prompts):
    assert flat(generate(loaded, prompts[:1], GREEDY, assistant=loaded)) == flat(
        generate(loaded, prompts[:1], GREEDY)
    )


def test_generation_stays_inside_the_context(loaded, prompts):
    (text,) = flat(generate(loaded, prompts[:1], {"eos_token_id": 1}))
    ids = encode_prompt(loaded, prompts[0])
    new = GenerateConfig(only_new=True)
    (tail,) = flat(generate(loaded, prompts[:1], {"eos_token_id": 1}, new))
    assert text == prompts[0] + tail
    assert len(loaded.tokenizer(tail, add_special_tokens=False)["input_ids"]) <= 24 - len(ids)
    with pytest.raises(UserError, match=r"prompt tokens and 30 new tokens exceed .* of 24: set"):
        list(generate(loaded, prompts[:1], {"max_new_tokens": 30}))
    with pytest.raises(UserError, match=r"exceed the context of 24"):
        list(generate(loaded, prompts[:1], {"max_length": 40}))


def test_a_prompt_longer_than_the_context_is_rejected(loaded):
    with pytest.raises(UserError, match=r"prompt has \d\d+ tokens, but the context .* is 24"):
        list(generate(loaded, ["short", "ka lo mi ne " * 40], GREEDY))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 0}, "num_beams is 0"),
        ({"max_new_tokens": -3}, "max_new_tokens is -3"),
        ({"top_p": 7.0, "do_sample": True}, "top_p is 7.0; expected a probability"),
        ({"temperature": -1.0, "do_sample": True}, "strictly positive float"),
        ({"num_beams": 2, "num_return_sequences": 3}, r"smaller or equal to `num_beams`"),
        ({"cache_implementation": "best"}, "Invalid `cache_implementation`"),
        ({"temperature": 0.5}, "`do_sample` is not set to `True`"),
    ],
)
def test_invalid_options(loaded, options, words):
    with pytest.raises(UserError, match=words):
        list(generate(loaded, ["ka"], options))


def test_prompts_from_argument_file_and_standard_input(tmp_path):
    lines = tmp_path / "prompts.txt"
    lines.write_text("first line\n" + json.dumps("two\nlines") + "\n")
    assert read_prompts(None, str(lines), io.StringIO()) == ["first line", "two\nlines"]
    assert read_prompts("given", None, io.StringIO("ignored")) == ["given"]
    assert read_prompts(None, None, io.StringIO("piped\n")) == ["piped\n"]


def test_invalid_prompts(tmp_path, monkeypatch):
    for arguments, words in [
        (("", None, io.StringIO()), "the prompt is empty"),
        ((None, None, io.StringIO("")), "the prompt is empty"),
        (("a", "b", io.StringIO()), "not both"),
        ((None, str(tmp_path / "no.txt"), io.StringIO()), "cannot read .*no.txt"),
    ]:
        with pytest.raises(UserError, match=words):
            read_prompts(*arguments)
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    with pytest.raises(UserError, match="no prompt: give"):
        read_prompts(None, None, terminal)
    for content, words in [
        (b"a\n\nb\n", "prompt 2 of 3 is empty"),
        (b"", "has no prompts"),
        (b"\xff\xfe", "is not UTF-8"),
        (b'"half a string\n', "not a JSON string"),
    ]:
        (tmp_path / "bad.txt").write_bytes(content)
        with pytest.raises(UserError, match=words):
            read_prompts(None, str(tmp_path / "bad.txt"), io.StringIO())


def test_a_shipped_model_is_known_by_its_name(trained, tmp_path, monkeypatch):
    name, hub_id = next(iter(SHIPPED.items()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("inl_core.run.shipped.__file__", str(tmp_path / "a/b/c/d/e/f.py"))
    with pytest.raises(UserError, match=f"cannot load a model from {hub_id}: Cannot reach"):
        load(name)  # which tests have switched off
    shutil.copytree(trained / "model", tmp_path / "checkpoints" / name)
    assert load(name).model.config.hidden_size == load(str(trained)).model.config.hidden_size


def test_generation_loads_no_datasets():
    python("-c", "import complexity_lm.generate, sys; assert 'datasets' not in sys.modules")
