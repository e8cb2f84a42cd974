"""Evaluation: scores against brute force, baselines, lm-eval, invalid input."""

import gzip
import importlib.util
import json
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from complexity_lm.config import EvalConfig
from complexity_lm.data import load_split
from complexity_lm.evaluate import ByteModel, evaluate, gzip_bits_per_byte
from complexity_lm.loading import load, weights_hash
from complexity_lm.scoring import Score, score_texts, windows
from complexity_lm.tokenizer import train_tokenizer
from inl_core.run.errors import UserError
from support.data import needs_data, shared_data

QUIET = EvalConfig(quiet=True)


@pytest.fixture(scope="module")
def loaded(trained):
    return load(str(trained))


def byte_model_by_definition(train, test, longest) -> float:
    """Bits per byte of the Witten-Bell model of that order, one byte at a time."""
    counts = [Counter() for _ in range(longest + 1)]
    for text in train:
        data = bytes(longest) + text.encode()
        for i in range(longest, len(data)):
            for order in range(longest + 1):
                counts[order][data[i - order : i + 1]] += 1
    bits, n = 0.0, 0
    for text in test:
        data = bytes(longest) + text.encode()
        for i in range(longest, len(data)):
            p = 1 / 256
            for order in range(longest + 1):
                context = data[i - order : i]
                followers = [c for gram, c in counts[order].items() if gram[:-1] == context]
                if followers:
                    n_gram, kinds = counts[order][data[i - order : i + 1]], len(followers)
                    p = (n_gram + kinds * p) / (sum(followers) + kinds)
            bits, n = bits - math.log2(p), n + 1
    return bits / n


def test_windows_score_each_token_once_and_are_full():
    for tokens in (1, 3, 4, 5, 8, 11, 30):
        for stride in (1, 2, 4):
            scored = []
            for window in windows(tokens, 4, stride):
                assert window.end - window.begin == min(4, window.end)
                scored += range(window.end - window.scored, window.end)
            assert scored == list(range(tokens))


@pytest.mark.parametrize("stride", [24, 10, 1])
def test_scores_equal_those_of_one_window_at_a_time(loaded, texts, stride):
    documents = [(texts / "00.txt").read_text(), "ka", (texts / "01.txt").read_text()[:300]]
    score = score_texts(loaded.model, loaded.tokenizer, documents, 24, stride, batch_size=5)
    nats, tokens = 0.0, 0
    for text in documents:
        ids = [0, *loaded.tokenizer(text, add_special_tokens=False)["input_ids"]]
        tokens += len(ids) - 1
        for window in windows(len(ids) - 1, 24, stride):
            with torch.no_grad():
                logits = loaded.model(torch.tensor([ids[window.begin : window.end]])).logits[0]
            log_p = logits.double().log_softmax(-1)
            for place in range(window.end - window.scored, window.end):
                nats -= float(log_p[place - window.begin, ids[place + 1]])
    assert score.nats == pytest.approx(nats, rel=1e-5)
    assert score.tokens == tokens
    assert score.bytes == sum(len(text.encode()) for text in documents)


def test_units_of_a_score():
    score = Score(nats=math.log(2) * 60, tokens=20, bytes=40)
    assert score.bits_per_byte == pytest.approx(1.5)
    assert score.perplexity == pytest.approx(8)


@pytest.mark.parametrize("order", [3, 5])
def test_byte_model_equals_its_definition(texts, order):
    train = [(texts / f"0{i}.txt").read_text()[:400] for i in range(3)]
    test = [(texts / "05.txt").read_text()[:200], "unseen: \U0001f680", ""]
    assert ByteModel(train, order).bits_per_byte(test) == pytest.approx(
        byte_model_by_definition(train, test, order), rel=1e-12
    )
    assert ByteModel([], order).bits_per_byte(["anything"]) == pytest.approx(8)


def test_gzip_bits_per_byte(texts):
    documents = [path.read_text() for path in sorted(texts.iterdir())]
    whole = "".join(documents).encode()
    bits = gzip_bits_per_byte(documents)
    assert bits == 8 * len(gzip.compress(whole, 9)) / len(whole)
    assert bits < 8


def test_evaluation_measures_the_held_out_side_of_the_training_source(loaded, texts, tmp_path):
    result = evaluate(loaded, f"text:{texts}", tmp_path, replace(QUIET, baselines=True))
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(result))
    heldout = list(load_split(loaded.data, "heldout")["text"])
    train = list(load_split(loaded.data, "train")["text"])
    score = score_texts(loaded.model, loaded.tokenizer, heldout, 24)
    metrics = result["metrics"]
    assert metrics["bits_per_byte"] == score.bits_per_byte
    assert metrics["gzip_bits_per_byte"] == gzip_bits_per_byte(heldout)
    assert metrics["order3_bits_per_byte"] == ByteModel(train).bits_per_byte(heldout)
    assert result["n_documents"] == len(heldout)
    settings = result["settings"]["eval"]
    assert (settings["split"], settings["context"], settings["stride"]) == ("heldout", 24, 24)
    assert result["weights_sha256"] == weights_hash(loaded.model)
    assert torch.__version__.startswith(result["versions"]["torch"])
    # The model is better than the uncompressed text.
    assert metrics["bits_per_byte"] < 8


def test_training_and_evaluation_agree(trained, texts):
    expected = json.loads((trained / "result.json").read_text())
    again = evaluate(str(trained), f"text:{texts}", config=QUIET)
    assert again["metrics"]["bits_per_byte"] == expected["metrics"]["bits_per_byte"]
    for key in ("text_fingerprint", "weights_sha256", "n_bytes", "n_tokens"):
        assert again[key] == expected[key]


def test_all_of_another_source_is_measured(loaded, texts, tmp_path):
    (tmp_path / "other.txt").write_text((texts / "00.txt").read_text() * 20)
    result = evaluate(loaded, f"text:{tmp_path / 'other.txt'}", config=QUIET)
    assert result["settings"]["eval"]["split"] == "all"
    assert result["n_bytes"] == (tmp_path / "other.txt").stat().st_size
    few = evaluate(loaded, f"text:{texts}", config=replace(QUIET, split="train", max_documents=2))
    assert few["n_documents"] == 2


def test_the_table_names_its_values(loaded, texts, capsys):
    evaluate(loaded, f"text:{texts}", config=EvalConfig(baselines=True))
    out = capsys.readouterr().out
    for words in ("bits per byte", "perplexity", "gzip -9", "order-3 byte model", "documents"):
        assert words in out


def test_a_lossy_tokenizer_is_rejected(loaded, words):
    lossy = words("<unk>", "<end>", "ka", unk_token="<unk>", eos_token="<end>")
    with pytest.raises(UserError, match="loses some of the text that begins with 'ka  lo"):
        score_texts(loaded.model, lossy, ["ka  lo"], 24)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"context": 25}, "context is 25; this model accepts 1 to 24"),
        ({"stride": 25}, "stride is 25; expected 1 to 24"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_documents": 0}, "max_documents is 0"),
        ({"device": "gpu"}, "device is 'gpu'; expected auto, cpu"),
    ],
)
def test_settings_out_of_range(trained, texts, changes, words):
    with pytest.raises(UserError, match=words):
        evaluate(str(trained), f"text:{texts}", config=replace(QUIET, **changes))


def test_no_measurement_and_an_existing_result_are_rejected(loaded, texts, tmp_path):
    with pytest.raises(UserError, match="give --source, --tasks, or both"):
        evaluate(loaded, None)
    with pytest.raises(UserError, match="baselines need a text"):
        evaluate(loaded, None, config=EvalConfig(tasks=["x"], baselines=True))
    (tmp_path / "result.json").write_text("precious")
    with pytest.raises(UserError, match="exists; choose another folder"):
        evaluate(loaded, f"text:{texts}", tmp_path, QUIET)
    assert (tmp_path / "result.json").read_text() == "precious"


def test_folders_without_a_model_and_other_tokenizers_are_rejected(trained, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="does not exist: give a model folder"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"has no config\.json"):
        load(str(tmp_path / "empty"))
    other = tmp_path / "tokenizer"
    train_tokenizer(["something else entirely"], 300).save_pretrained(other)
    with pytest.raises(UserError, match="not the one that the model was trained with"):
        load(str(trained), tokenizer=str(other))
    # A checkpoint loads like a finished model.
    checkpoint = next((trained / "checkpoints").iterdir())
    assert weights_hash(load(str(checkpoint)).model) == weights_hash(load(str(trained)).model)


HAS_HARNESS = importlib.util.find_spec("lm_eval") is not None


@pytest.mark.skipif(HAS_HARNESS, reason="lm-eval is installed")
def test_tasks_without_lm_eval_name_the_extra(loaded):
    with pytest.raises(UserError, match=r"pip install 'complexity-lm\[eval\]'"):
        evaluate(loaded, None, config=replace(QUIET, tasks=["wikitext"]))


@pytest.mark.skipif(not HAS_HARNESS, reason="lm-eval is not installed (the extra [eval])")
@needs_data
@pytest.mark.filterwarnings("default")
def test_lm_eval_measures_the_same_bits_per_byte(loaded, tmp_path):
    whole = (shared_data() / "text" / "wikitext2_test.txt").read_text()
    documents = [whole[i : i + 1500] for i in range(0, 15000, 1500)]
    folder = tmp_path / "documents"
    folder.mkdir()
    with (tmp_path / "documents.jsonl").open("w") as file:
        for i, text in enumerate(documents):
            file.write(json.dumps({"text": text}) + "\n")
            (folder / f"{i}.txt").write_text(text)
    task = tmp_path / "task.yaml"
    task.write_text(
        f"""
task: wikitext2_local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "documents.jsonl"}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}, {{metric: word_perplexity}}]
metadata: {{version: 1.0}}
"""
    )
    config = replace(QUIET, tasks=[str(task)], batch_size=4)
    result = evaluate(loaded, f"text:{folder}", tmp_path / "out", config)
    measured = result["tasks"]["wikitext2_local"]["bits_per_byte"]
    assert result["n_bytes"] == sum(len(text.encode()) for text in documents)
    assert measured == pytest.approx(result["metrics"]["bits_per_byte"], abs=1e-3)


@pytest.mark.skipif(not HAS_HARNESS, reason="lm-eval is not installed (the extra [eval])")
@pytest.mark.filterwarnings("default")
def test_tasks_that_generate_fit_into_a_short_context(loaded, tmp_path, caplog):
    rows = [{"question": f"ka {i} lo", "answer": "mi"} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def task(name: str, more: str) -> str:
        (tmp_path / f"{name}.yaml").write_text(
            f"""
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"]{more}}}
metric_list: [{{metric: exact_match}}]
metadata: {{version: 1.0}}
"""
        )
        return str(tmp_path / f"{name}.yaml")

    assert loaded.context < 256
    result = evaluate(loaded, None, config=replace(QUIET, tasks=[task("short", "")]))
    assert 0 <= result["tasks"]["short"]["exact_match"] <= 1
    assert "neither marked as CausalLM" not in caplog.text
    long = task("long", ", max_gen_toks: 256")
    with pytest.raises(UserError, match=r"as many new tokens as the context of \d+ has, or more"):
        evaluate(loaded, None, config=replace(QUIET, tasks=[long]))


@pytest.mark.skipif(not HAS_HARNESS, reason="lm-eval is not installed (the extra [eval])")
@pytest.mark.filterwarnings("default")
def test_unknown_tasks_are_rejected(loaded, tmp_path):
    with pytest.raises(UserError, match="lm-eval has no task no_such_task"):
        evaluate(loaded, None, config=replace(QUIET, tasks=["no_such_task"]))
    with pytest.raises(UserError, match="no such file"):
        evaluate(loaded, None, config=replace(QUIET, tasks=[str(tmp_path / "no.yaml")]))
