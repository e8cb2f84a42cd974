"""Misspelt fields and wrong values: exit status 2 and one line that names the nearest field."""

import pytest
import yaml

from complexity_dit import __main__ as cli

CASES = [
    (["train", "--optim.lrr=1"], "unknown field 'optim.lrr': did you mean optim.lr?"),
    (["train", "--stepps", "3"], "unknown field 'stepps': did you mean steps?"),
    (["train", "--lr=3"], "did you mean optim.lr?"),
    (["train", "--optimm.lr=3"], "did you mean optim.lr?"),
    (["train", "--qqqq=1"], "unknown field 'qqqq'; see complexity-dit train --help"),
    (["train", "--batch_size=many"], "batch_size is 'many'; expected int"),
    (
        ["train", "--compile=fast"],
        "compile is 'fast'; expected one of 'auto', 'no', 'regional', 'max' or bool",
    ),
    (["train", "--config=/nowhere.yaml"], "/nowhere.yaml"),
    (["train", "extra"], "train takes no 'extra'"),
    (["sample", "p", "--out=x", "--num_imges=3"], "did you mean num_images?"),
    (["sample", "p", "--out=x", "--labels.style", "A", "--sed=1"], "did you mean seed?"),
    (["train", "--text_encoder.source=t5"], "'t5' must be none, lm, lm:PATH or hf:ID_OR_PATH"),
    (["train", "--text_encoder.source=hf:"], "'hf:' must be none, lm, lm:PATH or hf:ID_OR_PATH"),
    (["train", "--text_encoder.max_length=0"], "max_length is 0; expected at least 1"),
    (["train", "--text_encoder.caption_dropout=2"], "caption_dropout is 2.0; expected a number in"),
    (
        ["train", "--text_encoder.source=lm", "--text_encoder.trainable=false"],
        "lm is a new model without any training",
    ),
    (
        ["train", "--text_encoder.source=hf:t5", "--text_encoder.bidirectional=true"],
        "hf:t5 is used as it is",
    ),
    (
        ["train", "--text_encoder.source=lm:x", "--text_encoder.overrides={hidden_size: 8}"],
        "sizes of a new model, source lm, not of lm:x",
    ),
    (["plan", "--model.overrides.hiden_size=8"], "no field 'hiden_size': did you mean hidden_size"),
    (["plan", "--model.overrides={class_path: a.B}"], "model.overrides has no field 'class_path'"),
    (["sample"], "pipeline, sample.out"),
    (["evaluate", "p", "--reference=art", "--data.sorce=art"], "did you mean data.source?"),
    (["evaluate", "p", "--reference=art", "--sample.sede=1"], "did you mean sample.seed?"),
    (["trian"], "unknown command 'trian': did you mean train?"),
    ([], "no command: choose one of demo, train"),
]
IN_YAML = [
    ({"optim": {"lrr": 1}}, "unknown field 'optim.lrr': did you mean optim.lr?"),
    ({"stepz": 1}, "did you mean steps?"),
    ({"modle": {"size": "S"}}, "did you mean model.size?"),
    ({"model": {"dynamics_placement": "brunch"}}, "is 'brunch'; expected one of 'stream'"),
    ({"data": {"label_fields": 3}}, "data.label_fields is '3'; expected list or null"),
]


def error_of(monkeypatch, capsys, arguments):
    monkeypatch.setattr("sys.argv", ["complexity-dit", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("complexity-dit: error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(("arguments", "words"), CASES)
def test_errors_on_the_command_line(monkeypatch, capsys, arguments, words):
    assert words in error_of(monkeypatch, capsys, arguments)


@pytest.mark.parametrize(("values", "words"), IN_YAML)
def test_errors_in_a_yaml_file(monkeypatch, capsys, tmp_path, values, words):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert words in error_of(monkeypatch, capsys, ["train", f"--config={tmp_path}/run.yaml"])


@pytest.mark.parametrize("template", ["{title}", "{style} by {artist}: {title} | {title}"])
def test_a_template_of_captions_is_text_although_it_looks_like_a_mapping(template):
    config = cli.PROGRAM.parse(["train", f"--data.caption_template={template}"])[1][0]
    assert config.data.caption_template == template


def test_a_broken_yaml_file(monkeypatch, capsys, tmp_path):
    (tmp_path / "run.yaml").write_text("a: [1\nb: }")
    assert "line 2" in error_of(monkeypatch, capsys, ["train", f"--config={tmp_path}/run.yaml"])


@pytest.mark.parametrize(
    ("written", "meant"),
    [("no", "no"), ("regional", "regional"), ("false", "no"), ("true", "regional")],
)
def test_compile_by_name_and_by_its_former_boolean(tmp_path, written, meant):
    (tmp_path / "run.yaml").write_text(f"compile: {written}\n")
    for argument in (f"--config={tmp_path}/run.yaml", f"--compile={written}"):
        assert cli.PROGRAM.parse(["train", argument])[1][0].compile == meant
