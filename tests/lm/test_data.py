"""Text: sources, the held-out split, packing, the order of blocks, resumable streams."""

import json
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from complexity_lm import hub
from complexity_lm.config import DataConfig
from complexity_lm.data import (
    BlockOrder,
    BlockStream,
    collate,
    count_tokens,
    fingerprint,
    is_held_out,
    load_corpus,
    load_split,
    pack,
    tokenize,
)
from complexity_lm.sources import read_documents
from complexity_lm.tokenizer import train_tokenizer
from inl_core.run.errors import UserError
from support.processes import python


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_tokenizer(load_split(DataConfig(source=f"text:{texts}"), "all")["text"], 300)


@pytest.fixture
def rows(tmp_path) -> Path:
    """A folder that `datasets` can stream: 500 short documents in two shards."""
    for shard in range(2):
        with (tmp_path / f"{shard}.jsonl").open("w") as file:
            for i in range(250):
                row = {"text": f"document {shard} {i}: " + "ka lo mi " * (i % 7 + 1), "id": i}
                file.write(json.dumps(row) + "\n")
    return tmp_path


def test_stdlib_excludes_tests_tables_and_packages():
    documents = list(read_documents("stdlib", "*", None))
    names = [document.name for document in documents]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    folders = {part for name in names for part in Path(name).parts[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data"}
    assert sum(len(document.text) for document in documents) > 5_000_000


def test_files_of_a_folder_are_read_unchanged_and_in_order(tmp_path):
    for name, text in {"b/x.txt": "x\r\n", "a.txt": " a ", "a.md": "m", ".hidden": "h"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    found = [(d.name, d.text) for d in read_documents(f"text:{tmp_path}", "*.txt", None)]
    assert found == [("a.txt", " a "), ("b/x.txt", "x\r\n")]


def test_a_single_file_is_cut_at_line_ends_without_loss(tmp_path):
    text = "".join(f"line {i} of a börk\n" for i in range(2000)) + "no line end"
    path = tmp_path / "book.txt"
    path.write_text(text)
    pieces = [d.text for d in read_documents(f"text:{path}", "*", None)]
    assert "".join(pieces) == text
    assert len(pieces) > 3
    assert all(piece.endswith("\n") for piece in pieces[:-1])
    assert all(8192 <= len(piece.encode()) < 8192 + 30 for piece in pieces[:-1])
    assert len(list(read_documents(f"text:{path}", "*", 0))) == 1


MEMORY = """
import sys
from pathlib import Path
import datasets
from benchmarks.common.memory import peak_of
from complexity_lm.config import DataConfig
from complexity_lm.data import load_corpus, pack, tokenize
from complexity_lm.tokenizer import load_tokenizer

datasets.disable_progress_bars()
tokenizer = load_tokenizer(sys.argv[1])

def blocks(path):
    return pack(tokenize(load_corpus(DataConfig(source=f"text:{path}")).train, tokenizer), 256)

blocks(sys.argv[2])  # what stays: modules, the tokenizer's threads
print(peak_of(lambda: blocks(sys.argv[3]), "cpu") * 2**20 / Path(sys.argv[3]).stat().st_size)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's counters")
def test_text_takes_at_most_four_bytes_of_memory_a_byte(tmp_path):
    text = "".join(document.text for document in read_documents("stdlib", "*", None))
    train_tokenizer([text[:500_000]], 2000).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "small.txt").write_text(text[:200_000])
    with (tmp_path / "large.txt").open("w") as file:
        for number in range(24_000_000 // len(text) + 1):
            file.write(f"{number}\n{text}")
    files = (tmp_path / name for name in ("tokenizer", "small.txt", "large.txt"))
    assert 1 < float(python("-c", MEMORY, *files).stdout.split()[-1]) < 4


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\u2028"])
def test_lines_end_where_python_ends_them(tmp_path, end):
    text = "".join(f"{'x' * (i % 37)} ü{end}" for i in range(400)) + "no end"
    path = tmp_path / "book.txt"
    path.write_bytes(text.encode())
    pieces = [d.text for d in read_documents(f"text:{path}", "*", 40)]
    assert [line for piece in pieces for line in piece.splitlines(keepends=True)] == (
        text.splitlines(keepends=True)
    )


@pytest.mark.parametrize("unit", ["word ", "中"], ids=["spaces", "no spaces"])
def test_a_file_of_one_long_line_is_cut_without_loss(tmp_path, unit):
    path = tmp_path / "line.txt"
    path.write_text(unit * 60_000)
    pieces = [d.text for d in read_documents(f"text:{path}", "*", None)]
    assert "".join(pieces) == unit * 60_000
    assert len(pieces) > 3
    assert max(len(piece.encode()) for piece in pieces) <= 5 * 8192
    assert all(piece.endswith(unit) for piece in pieces)
    path.write_bytes(b"word " * 60_000 + b"\xff")
    with pytest.raises(UserError, match="byte 0xff at offset 300000"):
        list(read_documents(f"text:{path}", "*", None))


def test_rows_without_text_are_left_out(tmp_path, tokenizer):
    rows = [{"text": None if i % 3 == 0 else f"ka lo {i}"} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [row["text"] for row in rows if row["text"]]
    for holdout in (0.0, 0.3):
        corpus = load_corpus(DataConfig(source=f"hub:{tmp_path}", holdout=holdout))
        held_out = list(corpus.heldout["text"]) if corpus.heldout else []
        assert sorted([*corpus.sample["text"], *held_out]) == sorted(texts)
        ids = [row["input_ids"] for row in tokenize(corpus.train, tokenizer)]
        assert [tokenizer.decode(each[1:]) for each in ids] == list(corpus.sample["text"])
    assert sorted(load_split(DataConfig(source=f"hub:{tmp_path}"), "all")["text"]) == sorted(texts)


def test_special_tokens_written_in_a_document_are_text(tokenizer, tmp_path):
    text = "ka <|endoftext|> lo <|padding|>\n"
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(text * 20)
    corpus = load_corpus(DataConfig(source=f"text:{tmp_path}", holdout=0))
    for ids in tokenize(corpus.train, tokenizer)["input_ids"]:
        assert ids.count(tokenizer.eos_token_id) == 1
        assert tokenizer.pad_token_id not in ids
        assert tokenizer.decode(ids[1:]) == text * 20
    # In a prompt they are tokens, as in transformers.
    assert tokenizer("<|padding|>")["input_ids"][-1] == tokenizer.pad_token_id


def test_positions_begin_again_at_each_document():
    rows = [{"input_ids": ids} for ids in ([5, 6, 0, 7, 8, 0], [0, 1, 2, 3, 0, 0])]
    assert "position_ids" not in collate(rows)
    positions = collate(rows, separator=0)["position_ids"].tolist()
    assert positions == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 0, 0]]


def test_the_split_depends_on_content_only(texts):
    config = DataConfig(source=f"text:{texts}")
    corpus = load_corpus(config)
    train, heldout = list(corpus.train["text"]), list(corpus.heldout["text"])
    assert len(train) + len(heldout) == 40
    assert heldout
    assert not set(train) & set(heldout)
    assert all(is_held_out(text, 0.1) for text in heldout)
    # A larger fraction holds out a superset.
    more = load_corpus(replace(config, holdout=0.5)).heldout["text"]
    assert set(heldout) < set(more)
    assert sum(is_held_out(f"document {i}", 0.1) for i in range(2000)) == pytest.approx(200, abs=45)


def test_a_separate_held_out_source(texts, tmp_path):
    (tmp_path / "other.txt").write_text("other\n" * 10)
    corpus = load_corpus(
        DataConfig(source=f"text:{texts}", heldout_source=f"text:{tmp_path / 'other.txt'}")
    )
    assert len(corpus.train) == 40
    assert list(corpus.heldout["text"]) == ["other\n" * 10]


def test_documents_of_a_file_that_has_separators(tmp_path):
    stories = tmp_path / "stories.txt"
    stories.write_bytes(b"one\ntwo <|end|>\n<|end|>\n<|end|>\nthree\n <|end|> \r\nfour")
    (tmp_path / "whole.txt").write_text("five\n" * 3)

    def read(path, piece_bytes=None):
        found = read_documents(f"text:{path}", "*", piece_bytes, separator="<|end|>")
        return [document.text for document in found]

    documents = ["one\ntwo <|end|>\n", "three\n", "four"]
    assert read(stories) == documents
    assert read(tmp_path) == [*documents, "five\n" * 3]
    assert read(tmp_path, 10) == [*documents, "five\n" * 2, "five\n"]


def test_fingerprint_depends_on_content_order_and_boundaries():
    prints = {fingerprint(t) for t in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["ab", "c", ""])}
    assert len(prints) == 4


def test_packing_joins_documents_to_one_stream(texts, tokenizer):
    corpus = load_corpus(DataConfig(source=f"text:{texts}"))
    tokens = tokenize(corpus.train, tokenizer)
    assert all(ids[0] == tokenizer.eos_token_id for ids in tokens["input_ids"])
    assert all(ids.count(tokenizer.eos_token_id) == 1 for ids in tokens["input_ids"])
    decoded = [tokenizer.decode(ids[1:]) for ids in tokens["input_ids"]]
    assert decoded == list(corpus.train["text"])
    stream = [i for ids in tokens["input_ids"] for i in ids]
    blocks = pack(tokens, 24)
    packed = [i for block in blocks["input_ids"] for i in block]
    assert {len(block) for block in blocks["input_ids"]} == {24}
    assert packed == stream[: len(packed)]
    assert len(stream) - len(packed) < 24
    batch = collate([blocks[0], blocks[1]])
    assert batch["input_ids"].shape == (2, 24)
    assert batch["labels"].equal(batch["input_ids"])


def test_token_counts(texts, tokenizer):
    tokens = tokenize(load_corpus(DataConfig(source=f"text:{texts}")).train, tokenizer)
    counts = count_tokens(tokens, 400)
    expected = Counter(i for ids in tokens["input_ids"] for i in ids)
    assert counts.tolist() == [expected[i] for i in range(400)]


def test_block_order_is_one_permutation_per_pass():
    order = list(BlockOrder(blocks=10, draws=25, seed=3))
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert order[:10] != order[10:20]
    assert len(set(order[20:])) == 5
    assert list(BlockOrder(10, 18, 3)) == order[:18]
    assert list(BlockOrder(10, 25, 4)) != order


def test_text_shorter_than_a_block_is_rejected(tokenizer, tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"ka lo {name}")
    corpus = load_corpus(DataConfig(source=f"text:{tmp_path}", holdout=0))
    with pytest.raises(UserError, match=r"training text has \d+ tokens in 2 documents.*of 512"):
        pack(tokenize(corpus.train, tokenizer), 512)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("tä".encode("latin-1"), r"a.txt is not UTF-8: byte 0xe4 at offset 1"),
        (b"", r"1 file\(s\) contain no text"),
    ],
)
def test_files_without_text_are_rejected(tmp_path, content, words):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=words):
        load_corpus(DataConfig(source=f"text:{tmp_path}"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"source": "text:/no/such/place"}, "no such file or folder"),
        ({"source": "wikitext"}, "expected stdlib, text:PATH or hub:NAME"),
        ({"source": "text:"}, "expected stdlib, text:PATH or hub:NAME"),
        ({"files": "*.rst"}, r"no file in the folder matches '\*.rst'"),
        ({"files": "0*.txt", "holdout": 1e-9}, r"holds out 0 of 10 documents.*piece_bytes"),
        ({"holdout": 1.0}, "data.holdout is 1.0"),
        ({"context": 1}, "data.context is 1"),
        ({"document_separator": "<|end|>"}, r"no line of its 10 file\(s\) is '<|end|>'"),
        ({"document_separator": " "}, "data.document_separator is ' '"),
        ({"document_separator": "a\nb"}, "expected the text of one line"),
    ],
)
def test_invalid_sources_and_splits(texts, settings, words):
    with pytest.raises(UserError, match=words):
        load_corpus(replace(DataConfig(source=f"text:{texts}"), **settings))


def block_stream(rows, tokenizer) -> BlockStream:
    corpus = load_corpus(DataConfig(source=f"hub:{rows}"))
    return BlockStream(pack(tokenize(corpus.train, tokenizer), 24), every=8)


def test_a_stream_is_split_by_content(rows):
    config = DataConfig(source=f"hub:{rows}", heldout_documents=20, sample_documents=100)
    corpus = load_corpus(config)
    assert corpus.streamed
    train = [row["text"] for row in corpus.train]
    assert len(corpus.heldout) == 20
    assert len(corpus.sample) == 100
    assert list(corpus.sample["text"]) == train[:100]
    assert not set(train) & set(corpus.heldout["text"])
    assert all(not is_held_out(text, 0.1) for text in train)


def test_a_stream_resumes_where_it_stopped(rows, tokenizer, tmp_path_factory):
    checkpoint = tmp_path_factory.mktemp("checkpoint")

    def ids(blocks):
        return [list(block["input_ids"]) for block in blocks]

    once = ids(islice(iter(block_stream(rows, tokenizer)), 900))
    assert len({tuple(block) for block in once}) < 900  # the stream restarted
    for stop, read_ahead in ((8, 0), (40, 3), (44, 11), (700, 16)):
        first = block_stream(rows, tokenizer)
        assert ids(islice(iter(first), stop + read_ahead)) == once[: stop + read_ahead]
        first.save(checkpoint, stop)
        second = block_stream(rows, tokenizer)
        second.load(checkpoint)
        assert ids(islice(iter(second), 100)) == once[stop : stop + 100]


def test_an_interrupted_stream_names_the_block(rows, tokenizer, monkeypatch):
    stream = block_stream(rows, tokenizer)
    blocks = type(stream.blocks)
    real = blocks.__iter__

    def breaking(self):
        yield from islice(real(self), 5)
        raise ConnectionError("the network is gone")

    monkeypatch.setattr(blocks, "__iter__", breaking)
    with pytest.raises(UserError, match=r"after block 5: the network is gone.*--resume auto"):
        list(islice(iter(stream), 9))


def test_a_missing_stream_position_is_rejected(rows, tokenizer, tmp_path_factory):
    with pytest.raises(UserError, match="cannot read the position"):
        block_stream(rows, tokenizer).load(tmp_path_factory.mktemp("empty"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"text_column": "content"}, r"no text in column 'content' \(its columns: text, id\)"),
        ({"hub_split": "validation"}, "split validation"),
        ({"source": "hub:/no/such/folder"}, "cannot read hub:/no/such/folder"),
        ({"source": "hub:"}, "expected stdlib"),
        ({"holdout": 1e-9}, "one side of the split has no document"),
    ],
)
def test_invalid_streams(rows, settings, words):
    with pytest.raises(UserError, match=words):
        load_corpus(replace(DataConfig(source=f"hub:{rows}"), **settings))


def test_an_unreachable_hub_gives_one_line_at_once(monkeypatch):
    config = DataConfig(source="hub:HuggingFaceFW/fineweb-edu", hub_subset="sample-10BT")
    # Offline, and not cached.
    with pytest.raises(UserError, match="cannot read hub:HuggingFaceFW/fineweb-edu") as stop:
        load_corpus(config)
    assert "\n" not in str(stop.value)
    # Online, but the Hub does not answer.
    monkeypatch.setattr(hub, "is_offline", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"cannot reach http://127.0.0.1:9.*HF_HUB_OFFLINE"):
        load_corpus(config)
