"""Fuzzing of the parsers of folders: any input gives a value or a `UserError`.

Each row is a parser of a file of a pipeline, checkpoint, cache or model. It runs for
`COMPLEXITY_FUZZ_SECONDS` (10 by default, 300 for a full run).
"""

import contextlib
import io
import json
import math
import random
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save
from transformers.trainer_pt_utils import safe_globals

from complexity_dit import labels
from complexity_dit.app import server
from complexity_dit.cli import convert
from complexity_dit.config import DataConfig, ObjectiveConfig, TrainConfig
from complexity_dit.data import latents
from complexity_dit.evaluation import image_sets, networks, report
from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel
from complexity_dit.pipelines import pipeline, sampling
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.training.objective import build_scheduler
from complexity_lm import data, generate, hub, loading
from inl_core.run import csv_log
from inl_core.run.errors import UserError
from inl_core.run.torch_files import check_torch_file
from support.authors import checkpoint
from support.fuzzing import MARKS, Parser, Rows, of_file
from support.mangled import ODD, mangled_bytes, mangled_json, mangled_values

ROWS = Rows()
pytestmark = MARKS


def small_pipeline() -> ComplexityDiTPipeline:
    torch.manual_seed(0)
    network = ComplexityDiTTransformer2DModel(
        sample_size=8, hidden_size=32, num_layers=1, num_attention_heads=2,
        label_fields=["style", "genre"], num_classes=[3, 2],
    )  # fmt: skip
    names = {"style": dict(enumerate("abc")), "genre": dict(enumerate("xy"))}
    return ComplexityDiTPipeline(network, build_scheduler(ObjectiveConfig()), id2label=names)


def header(value: Any) -> bytes:
    text = json.dumps(value).encode()
    return len(text).to_bytes(8, "little") + text + bytes(24)


@ROWS.row
def safetensors_header(folder: Path) -> Parser:
    good = {
        "__metadata__": {"format": "pt"},
        "weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "bias": {"dtype": "F32", "shape": [2], "data_offsets": [16, 24]},
    }
    network = torch.nn.Linear(2, 2)
    files = [header(good), save(network.state_dict())]
    (folder / "config.json").write_text("{}")

    def parse(path: Path) -> None:
        with contextlib.suppress(UserError):
            convert._read(path)
        loading.check_checkpoint(network, path.parent)

    cases = st.one_of(mangled_bytes(files), mangled_values([good]).map(header))
    parse_file = of_file(folder / "model.safetensors", parse)
    return Parser(cases, parse_file)


@ROWS.row
def training_states(folder: Path) -> Parser:
    """What Trainer keeps beside the weights; also with a changed pickle in a good archive."""
    network = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    states = [
        optimizer.state_dict(),
        {"numpy": np.random.get_state(), "python": random.getstate(), "cpu": torch.get_rng_state()},
    ]
    files, pickles = [], []
    for state in states:
        torch.save(state, file := io.BytesIO())
        files.append(file.getvalue())
        with zipfile.ZipFile(file) as archive:
            pickles.append(archive.read("archive/data.pkl"))

    def with_pickle(data: bytes) -> bytes:
        new = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(files[0])) as old, zipfile.ZipFile(new, "w") as archive:
            for name in old.namelist():
                archive.writestr(name, data if name.endswith("data.pkl") else old.read(name))
        return new.getvalue()

    def parse(path: Path) -> None:
        check_torch_file(path)
        with hub.report_errors("cannot read the state"), safe_globals():
            torch.load(path, weights_only=True)

    cases = st.one_of(mangled_bytes(files), mangled_bytes(pickles).map(with_pickle))
    return Parser(cases, of_file(folder / "optimizer.pt", parse))


@ROWS.row
def converters_state_dict(folder: Path) -> Parser:
    shapes = {name: list(value.shape) for name, value in checkpoint(routed=False).items()}
    sizes = st.lists(st.integers(0, 3) | st.sampled_from([16, 33, 64]), max_size=5)
    sizes = sizes.filter(lambda shape: math.prod(shape) < 10**6)  # as in a real file

    @st.composite
    def cases(draw: st.DrawFn) -> dict[str, list[int]]:
        changed = draw(
            st.dictionaries(
                st.sampled_from([*shapes, "blocks.x.odd", "blocks"]), sizes | st.none(), max_size=3
            )
        )
        kept = shapes | changed
        return {name: shape for name, shape in kept.items() if shape is not None}

    def parse(shapes: dict[str, list[int]]) -> str:
        return convert.from_state_dict({n: torch.ones(s) for n, s in shapes.items()}).summary()

    return Parser(cases(), parse)


@ROWS.row
def label_tables(folder: Path) -> Parser:
    network = small_pipeline().transformer
    good = [
        {"style": {"0": "a", "1": "b", "2": "c"}, "genre": {"0": "x", "1": "y"}},
        {"genre": {0: "x", 1: "y"}, "style": {2: "c", 0: "a", 1: "b"}},
    ]

    def parse(case: tuple[Any, Any]) -> None:
        table = pipeline.read_id2label(case[0], network)
        for field, names in table.items():
            labels.resolve_label([names[i] for i in range(len(names))], case[1], field)

    cases = st.tuples(mangled_values(good), ODD | st.sampled_from(["a", "A", "1", "²", "٣"]))
    return Parser(cases, parse)


@ROWS.row
def model_index(folder: Path) -> Parser:
    small_pipeline().save_pretrained(folder / "pipeline")
    path = folder / "pipeline" / "model_index.json"
    good = json.loads(path.read_text())
    foreign = good | {"transformer": ["os", "system"], "vae": ["builtins", "eval"]}
    parse = of_file(path, lambda path: sampling.load_pipeline(str(path.parent)).label_names)
    return Parser(mangled_json([good, good, foreign]), parse)


@ROWS.row
def network_config(folder: Path) -> Parser:
    small_pipeline().save_pretrained(folder / "pipeline")
    path = folder / "pipeline" / "transformer" / "config.json"
    good = json.loads(path.read_text())
    parse = of_file(path, lambda path: sampling.load_pipeline(str(path.parents[1])).label_names)
    return Parser(mangled_json([good]), parse)


@ROWS.row
def adapter_json(folder: Path) -> Parser:
    small_pipeline().save_pretrained(folder / "base")
    (folder / "adapter").mkdir()
    base = sampling.load_pipeline(str(folder / "base"))
    sha256 = sampling.weights_sha256(base.transformer)
    good = {"base": "../base", "base_sha256": sha256, "labels": {"style": ["d"]}}
    path = folder / "adapter" / sampling.ADAPTER_FILE
    parse = of_file(path, lambda path: sampling.load_pipeline(str(path.parent)))
    # The folder has no matrices, so that a good file ends with an error too.
    return Parser(mangled_json([good]), parse, gives_values=False)


@ROWS.row
def latent_cache(folder: Path) -> Parser:
    rows = {
        "sha256": [f"{n:016x}" * 4 for n in (2**62, 2**63, 2**63 + 5)], "name": ["a", "b", "c"],
        "label_style": [0, 1, -1], "latents": [[0.0] * 32] * 3,
    }  # fmt: skip
    (folder / "parts").mkdir()
    from datasets.arrow_writer import ArrowWriter

    kinds = {name: datasets.Value("string") for name in ("sha256", "name")}
    kinds |= {"label_style": datasets.Value("int64")}
    kinds |= {"latents": datasets.List(datasets.Value("float16"), length=32)}
    features = datasets.Features(kinds)
    with ArrowWriter(path=str(latents.part_path(folder, 0)), features=features) as writer:
        writer.write_table(datasets.Dataset.from_dict(rows, features=features).data.table)
        writer.finalize()
    good = {
        "format": latents.FORMAT, "resolution": 16, "skipped": 0, "shape": [4, 2, 2], "images": 3,
        "has_std": False, "mirrored": True, "part_size": 8, "source_fingerprint": "f",
        "source": asdict(DataConfig(source="art")), "label_names": {"style": ["a", "b"]},
        "vae": {"name": "x", "class": "TinyAutoencoder", "sha256": "0", "scaling_factor": 1.0},
        "statistics": {"mean": [0.0] * 4, "std": [1.0] * 4, "holdout": 0.1},
    }  # fmt: skip
    asked = DataConfig(source=f"latents:{folder}", resolution=16)

    def parse(path: Path) -> None:
        latents.source_config(asked)
        images = latents.load_training_data(asked)
        images.clean([0, len(images) - 1], torch.zeros(2, dtype=torch.bool))

    parse_file = of_file(folder / latents.CACHE_FILE, parse)
    return Parser(mangled_json([good]), parse_file)


@ROWS.row
def latent_plan(folder: Path) -> Parser:
    path = folder / latents.PLAN_FILE
    parse = of_file(path, lambda path: latents.read_cache(path.parent))
    return Parser(mangled_json([{"images": 3, "part_size": 8}]), parse, gives_values=False)


@ROWS.row
def checkpoint_json(folder: Path) -> Parser:
    checkpoint, resume = saved_run(folder)
    path = checkpoint / "state.json"
    parse = of_file(path, lambda path: resume())
    return Parser(mangled_json([json.loads(path.read_text())]), parse)


@ROWS.row
def checkpoint_weights(folder: Path) -> Parser:
    checkpoint, resume = saved_run(folder)
    files = {n: (checkpoint / f"{n}.safetensors").read_bytes() for n in ("model", "optimizer")}

    def parse(case: tuple[str, bytes]) -> None:
        for name, good in files.items():
            (checkpoint / f"{name}.safetensors").write_bytes(case[1] if case[0] == name else good)
        resume()

    cases = st.one_of([st.tuples(st.just(n), mangled_bytes([x])) for n, x in files.items()])
    return Parser(cases, parse)


def saved_run(folder: Path) -> tuple[Path, Callable[[], Any]]:
    """A checkpoint, and a function that resumes from it."""
    from complexity_dit.training.state import SavedPipeline, build_state

    pipe = small_pipeline()
    config = TrainConfig(steps=4)
    run = build_state(pipe.transformer, config)
    sum(p.sum() for p in pipe.transformer.parameters()).backward()
    run.optimizer.step()
    parts = SavedPipeline(pipe.scheduler, pipe.id2label, asdict(config.data))
    checkpoint = run.save(folder / "checkpoints", parts, {"config": asdict(config)})
    for sums in checkpoint.glob("SHA256SUMS*"):
        sums.unlink()  # a hostile folder has matching ones, or none

    def resume() -> None:
        build_state(pipe.transformer, config).load(checkpoint, parts, pipe.label_names)

    return checkpoint, resume


@ROWS.row
def data_json(folder: Path) -> Parser:
    good = asdict(DataConfig())
    (folder / "model_index.json").write_text("{}")  # the mark of a pipeline folder
    parse = of_file(folder / image_sets.DATA_FILE, lambda path: image_sets.trained_on(path.parent))
    return Parser(mangled_json([good]), parse)


@ROWS.row
def result_json(folder: Path) -> Parser:
    good = {
        "metrics": {"fid": 1.5, "kid": 0.1, "is": None}, "n_generated": 4, "n_reference": 4,
        "settings": {"target": "a", "eval": {"seed": 0}, "sample": {"seed": 1}, "weights": ["x"]},
    }  # fmt: skip
    other = folder / "other.json"
    other.write_text(json.dumps(good))
    parse = of_file(folder / "result.json", lambda path: report.compare(path, other, ["sample"]))
    return Parser(mangled_json([good]), parse)


@ROWS.row
def csv_curve(folder: Path) -> Parser:
    text = b"step,loss,lr\n1,0.5,0.1\n2,0.4,0.1\n30,0.3,0.1\n"
    parse = of_file(folder / "l.csv", lambda path: csv_log.CsvLog(path, ["step", "loss", "lr"], 9))
    return Parser(mangled_bytes([text, b"step\n", b"", b'"a\nb",c\n1,2\n']), parse)


@ROWS.row
def preprocessor_json(folder: Path) -> Parser:
    good = {"crop_size": {"height": 8}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    path = folder / "preprocessor_config.json"
    parse = of_file(path, lambda path: networks._preprocessing(path.parent))
    return Parser(mangled_json([good, {**good, "crop_size": 8}]), parse)


@ROWS.row
def app_event(folder: Path) -> Parser:
    good = {"data": ["a", 1, None], "event_data": None, "fn_index": 0, "session_hash": "x"}

    def parse(body: bytes) -> None:
        if error := server.event_error(body):
            raise UserError(error)

    return Parser(mangled_json([good]), parse)


@ROWS.row
def training_json(folder: Path) -> Parser:
    from complexity_lm.config import DataConfig as Text

    good = {"data": asdict(Text()), "tokenizer_sha256": "0"}
    path = folder / loading.TRAINING_FILE
    parse = of_file(path, lambda path: loading.read_training_file(path.parent))
    return Parser(mangled_json([good]), parse)


@ROWS.row
def prompts_file(folder: Path) -> Parser:
    good = [b'a line\n"a \\u00e9 string"\n', b'"\\ud800"\n', b"x\x00y\n\x1b[2J\n"]
    path = folder / "prompts.txt"
    parse = of_file(path, lambda path: generate.read_prompts(None, str(path), io.StringIO()))
    return Parser(mangled_bytes(good), parse)


@ROWS.row
def stream_position(folder: Path) -> Parser:
    rows = datasets.Dataset.from_dict({"input_ids": [[1]] * 4}).to_iterable_dataset()
    good = {"consumed": 2, "noted": 2, "state": rows.state_dict()}

    def parse(path: Path) -> None:
        blocks = data.BlockStream(rows, 2)
        blocks.load(path.parent)

    parse_file = of_file(folder / data.POSITION_FILE, parse)
    return Parser(mangled_json([good]), parse_file)


@pytest.mark.parametrize("name", ROWS)
def test_any_input_gives_a_value_or_a_plain_error(name, tmp_path):
    ROWS.check(name, tmp_path)
