"""Untrusted text: HTML and control characters in labels, and YAML and JSON beyond the limits."""

import ast
import json
import re

import numpy as np
import pytest
import yaml

from complexity_dit import labels
from complexity_dit.app import page as app_page
from complexity_dit.app.gallery import Gallery, Settings
from complexity_dit.evaluation import report as report_charts
from complexity_dit.pipelines import model_card
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.pipelines.sampling import load_pipeline, sample
from inl_core.run import json_files as bounded
from inl_core.run.errors import UserError

SCRIPT = '<script>alert("x")</script>'
NASTY = [SCRIPT, "a\nb\x1b[31m`c`](http://x)", "$\\frac$ $"]


@pytest.fixture
def nasty(pipe) -> ComplexityDiTPipeline:
    names = {"style": dict(enumerate(NASTY)), "genre": {0: "x", 1: "y"}}
    return ComplexityDiTPipeline(pipe.transformer, pipe.scheduler, id2label=names)


def test_the_gallery_escapes_names(nasty):
    gallery = Gallery(nasty)
    for strip in ("style", None):
        asked = Settings(labels={"style": SCRIPT}, strip=strip, num_images=2, num_inference_steps=1)
        asked = gallery.check(asked)
        *_, frame = gallery.paint(asked)
        page = app_page.wall(gallery, asked, frame)
        assert "<script" not in page
        assert "&lt;script&gt;" in page
        assert "\x1b" not in page
    assert "<script" not in app_page.masthead(gallery)
    assert "<script" not in app_page.refusal(SCRIPT)


def test_the_card_escapes_names(nasty, tmp_path):
    nasty.save_pretrained(tmp_path)
    card = (tmp_path / model_card.CARD_FILE).read_text()
    listed = next(line for line in card.splitlines() if line.startswith("- **style**"))
    assert "&lt;script&gt;" in listed
    assert "\\`c\\`\\](http://x)" in listed
    assert "\x1b" not in card
    code = card.split("```python")[1].split("```")[0]
    call = next(line for line in code.splitlines() if line.startswith("image = "))
    # The line is valid Python with exactly this name.
    asked = eval(
        call.removeprefix("image = pipe").removesuffix(".images[0]").replace("(", "dict(", 1)
    )
    assert asked == {"labels": {"style": SCRIPT, "genre": "x"}}


HOSTILE = '[x](http://x) <script>alert(1)</script> `c` | "+exit()+" \n# title'


def test_the_card_escapes_folders_classes_and_sources(pipe, tmp_path):
    folder = tmp_path / "a`b](http://x)<script>|\n# title\n```\nexit()"
    pipe.save_pretrained(folder)
    for name in ("scheduler/scheduler_config.json", "transformer/config.json"):
        config = json.loads((folder / name).read_text())
        hostile = {k: HOSTILE for k in config if k in ("_class_name", "dynamics_placement")}
        (folder / name).write_text(json.dumps(config | hostile))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", HOSTILE]}))
    data = {"source": f"hub:{HOSTILE}", "resolution": 8, "holdout": 0.1, "flip": False}
    (folder / "data.json").write_text(json.dumps(data))
    model_card.write_card(folder)
    header, body = (folder / "README.md").read_text().split("---\n")[1:3]
    assert yaml.safe_load(header)["library_name"] == "diffusers"
    text, code, rest = re.split("```(?:python)?\n", body)
    assert "<script" not in text + rest
    assert not re.search(r"(?<!\\)\]\(http://x", text + rest)
    assert len(re.findall("^# ", body, re.MULTILINE)) == 1
    names = [node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)]
    assert set(names) == {"DiffusionPipeline", "pipe", "image"}


def test_the_card_of_an_adapter_escapes_its_base(tmp_path):
    about = {"base": HOSTILE, "base_sha256": HOSTILE, "labels": {HOSTILE: [HOSTILE]}}
    (tmp_path / "adapter.json").write_text(json.dumps(about))
    model_card.write_card(tmp_path)
    text, code, rest = re.split("```(?:python)?\n", (tmp_path / "README.md").read_text())
    assert "<script" not in text + rest
    assert not re.search(r"(?<!\\)\]\(http://x", text + rest)
    names = [node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)]
    assert set(names) == {"ComplexityDiTPipeline", "pipe", "image"}


def test_the_report_escapes_names():
    rows = {name: {"n": 4, "fid": 1.0} for name in NASTY}
    chart = report_charts.label_chart(rows)
    assert "<script" not in chart
    assert "&lt;script&gt;" in chart
    assert "$\\frac$" in chart


def test_a_grid_has_captions_of_one_line(nasty, tmp_path):
    nasty.save_pretrained(tmp_path / "pipeline")
    assert sample(str(tmp_path / "pipeline"), str(tmp_path / "grid.png"), 8).is_file()


def test_no_control_character_reaches_the_terminal(command, nasty, tmp_path):
    nasty.save_pretrained(tmp_path / "pipeline")
    asked = (
        "sample",
        tmp_path / "pipeline",
        "--out",
        tmp_path / "x",
        "--labels.style",
        "\x1b[2Jq\r",
    )
    status, _, said = command(*asked)
    assert status == 2
    message = said.partition("error:")[2]
    assert "\x1b" not in message
    assert "\r" not in message
    status, _, said = command("\x1b[2J")
    assert (status, "\x1b" in said) == (2, False)


def test_a_number_of_thousands_of_digits_is_not_an_id():
    with pytest.raises(UserError, match="is not one of its 2 names"):
        labels.resolve_label(["a", "b"], "9" * 5000, "style")


@pytest.mark.parametrize(
    "table",
    [
        {"style": {"0": "a", "1": "b", "7": "c"}, "genre": {"0": "x", "1": "y"}},
        {"style": {"0": "a", "1": "b", "2": None}, "genre": {"0": "x", "1": "y"}},
        {"style": ["a", "b", "c"], "genre": {"0": "x", "1": "y"}},
        ["style", "genre"],
    ],
)
def test_a_wrong_label_table_is_refused(pipe, tmp_path, table):
    pipe.save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": table}))
    with pytest.raises(UserError, match="id2label"):
        load_pipeline(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 5000, "cannot be read as settings"),
        ("steps: !!python/object/apply:os.system [true]\n", "python/object"),
        ("steps: !!int x\n", "cannot be read"),
        ("steps: [1, 2\n", "cannot be read as settings"),
    ],
)
def test_settings_beyond_the_limits_are_refused(command, tmp_path, text, said):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    status, _, error = command("train", "--config", path)
    assert status == 2, error
    assert np.any([part in error for part in said.split("|")]), error
    assert len(error) < 2000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "a": 2}', "occurs twice"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": 1e999}', "too large"),
        ("[" * 100_000, "nested deeper"),
        ("[" * 60 + "]" * 60, "nested deeper"),
        ('{"a": ' + "9" * 10_000 + "}", "digits"),
        (b"\xff", "codec|decode"),
    ],
)
def test_json_beyond_the_limits_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        bounded.parse_json(text)


def test_a_json_file_that_is_too_large_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(bounded, "MAX_JSON_BYTES", 100)
    (tmp_path / "x.json").write_text("[" + "1, " * 50 + "1]")
    with pytest.raises(ValueError, match="the limit is 100"):
        bounded.read_json_object(tmp_path / "x.json")
