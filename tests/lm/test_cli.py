"""The command line: working commands, and messages and exit status for invalid input."""

import io
import json
import shutil

import pytest
import yaml

from complexity_lm import DeepConfig, __version__, count_parameters
from complexity_lm import __main__ as cli
from complexity_lm.config import TrainConfig
from complexity_lm.demo import demo_config, sample_lines
from complexity_lm.loading import load

SMALL = [
    "--steps=2", "--batch_size=4", "--log_every=1", "--eval_blocks=2", "--report_to=none",
    "--data.context=24", "--tokenizer.vocab_size=300", "--optim.warmup_steps=1",
    "--model.overrides={hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, "
    "num_attention_heads: 2, num_key_value_heads: 1}",
]  # fmt: skip


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command as a shell does; returns exit status, standard output and standard error."""

    def run(*arguments, stdin=""):
        monkeypatch.setattr("sys.argv", ["complexity-lm", *map(str, arguments)])
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err

    return run


def train_config(path) -> TrainConfig:
    return cli.PROGRAM.parse(["train", f"--config={path}"])[1][0]


def test_train_generate_evaluate_and_inspect(command, texts, tmp_path):
    out, source = tmp_path / "run", f"text:{texts}"
    status, text, err = command("train", "--out", out, "--data.source", source, *SMALL)
    assert status == 0, err
    assert f"the model is in {out / 'model'}" in text
    status, text, _ = command(
        "generate", out, "--prompt", "Ka lo", "--max_new_tokens", "4", "--do_sample", "true",
        "--temperature", "0.8", "--top_p", "0.9",
    )  # fmt: skip
    assert status == 0
    assert text.startswith("Ka lo")
    assert command("generate", out, "--max_new_tokens=4", stdin="Mi")[1].startswith("Mi")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Ka\nLo mi\n")
    text = command("generate", out, "--prompts_file", prompts, "--num_beams=2")[1]
    assert "=== prompt 2, text 1\nLo mi" in text
    status, text, _ = command(
        "evaluate", out / "model", "--source", source, "--out", tmp_path / "eval", "--stride=12"
    )
    assert status == 0
    assert "bits per byte" in text
    assert json.loads((tmp_path / "eval" / "result.json").read_text())["n_documents"] == 9
    described = yaml.safe_load(command("inspect", out)[1])
    assert described["sizes"]["hidden_size"] == 32
    assert described["parameters"]["active"] == described["parameters"]["total"]
    assert described["trained_on"]["source"] == source
    assert described["certificate"]["frozen_points_stable"] is True


def test_train_uses_the_output_of_the_tokenizer_command(command, texts, tmp_path):
    source, tokenizer = f"text:{texts}", tmp_path / "tokenizer"
    status, text, _ = command(
        "tokenizer", "--source", source, "--out", tokenizer, "--vocab_size", "280"
    )
    assert status == 0
    assert "280 ids" in text
    arguments = ["--out", tmp_path / "run", "--data.source", source, *SMALL]
    assert command("train", *arguments, "--tokenizer.path", tokenizer)[0] == 0
    assert yaml.safe_load(command("inspect", tmp_path / "run")[1])["tokenizer"]["ids"] == 280


def test_demo_yaml_equals_the_demo_config():
    assert train_config("configs/lm/demo.yaml") == demo_config("runs/demo-lm")


@pytest.mark.parametrize("name", ["demo", "loop", "tinyshakespeare", "fineweb-edu-150m"])
def test_committed_configs_can_be_parsed_and_overridden(command, tmp_path, name):
    status, text, _ = command(
        "train", f"--config=configs/lm/{name}.yaml", "--optim.lr", "5e-5", "--print_config"
    )
    assert status == 0
    (tmp_path / "printed.yaml").write_text(text)
    assert train_config(tmp_path / "printed.yaml").optim.lr == 5e-5


def test_fineweb_config_has_150_million_parameters():
    config = train_config("configs/lm/fineweb-edu-150m.yaml")
    made = DeepConfig.from_preset(
        config.model.preset,
        vocab_size=config.tokenizer.vocab_size,
        num_experts=config.model.num_experts,
        dynamics_placement=config.model.dynamics_placement,
        dynamics_adaptive=config.model.dynamics_adaptive,
    )
    assert count_parameters(made).active == pytest.approx(150e6, rel=0.01)


def test_help_explains_every_field(command):
    text = " ".join(command("train", "--help")[1].split())
    for words in ("Peak learning rate", "Fraction of the documents held out", "Where INL dynamics"):
        assert words in text
    text = command("generate", "--help")[1]
    for flag in ("--max_new_tokens", "--top_k", "--repetition_penalty", "--num_beams", "--seed"):
        assert flag in text


@pytest.mark.parametrize("name", ["generate", "chat"])
def test_help_shows_its_own_options_before_those_of_transformers(command, name):
    own, _, others = command(name, "--help")[1].partition("options of transformers'")
    for flag in ("--tokenizer", "--seed", "--device"):
        assert f"{flag} " in own
    for flag in ("--max_new_tokens", "--do_sample", "--top_k"):
        assert f"{flag} " in others
        assert f"{flag} " not in own.partition("options:")[2]  # the usage line has all


def test_every_generation_option_has_a_type_and_help():
    flags = cli.generation_flags()
    assert flags["temperature"][0] == float | None
    assert flags["do_sample"][0] == bool | None
    assert flags["max_new_tokens"][0] == int | None
    assert len(flags) > 40
    assert all(words for _, words in flags.values())


def test_version(command):
    assert __version__ in command("--version")[1]


def test_invalid_input_exits_with_status_2_and_a_message(command, trained, texts, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"\xe4\n" * 99)
    (tmp_path / "short.txt").write_text("ka\nlo\n")
    start = ["train", *SMALL, f"--data.source=text:{texts}", "--out"]
    cases = [
        (["generate", trained, "--prompt", ""], "the prompt is empty"),
        (["generate", trained], "the prompt is empty"),
        (["generate", trained, "--prompt", "ka " * 99], "the context of this model is 24"),
        (["generate", trained, "--prompt=a", "--temperature=hot"], "temperature"),
        (["generate", trained, "--prompt=a", "--temprature=1"], "did you mean temperature?"),
        (["generate", tmp_path / "none", "--prompt=a"], "does not exist"),
        (["evaluate", trained, "--source=text:/none", "--out", tmp_path / "e"], "no such file"),
        (["evaluate", trained], "nothing to measure"),
        (["inspect", tmp_path], "has no config.json"),
        (["tokenizer", "--source=wiki", "--out", tmp_path / "t"], "expected stdlib, text:PATH"),
        ([*start, trained], "--resume auto"),
        ([*start, tmp_path / "a", f"--data.source=text:{tmp_path}/latin.txt"], "not UTF-8"),
        (
            [*start, tmp_path / "b", f"--data.source=text:{tmp_path}/short.txt",
             "--data.holdout=0"],
            "fewer than a block of 24",
        ),
        ([*start, tmp_path / "c", "--data.source=hub:nobody/nothing"], "cannot read hub:nobody"),
        ([*start, tmp_path / "d", "--optim.lrr=1"], "did you mean optim.lr?"),
        ([*start, tmp_path / "i", "--model.overrides={hiden_size: 8}"], "did you mean hidden_size"),
        ([*start, tmp_path / "j", "--model.overrides={class_path: a.B}"], "no field 'class_path'"),
        ([*start, tmp_path / "e", "--model.preset=2m"], "choose from: 15m"),
        ([*start, tmp_path / "f", "--optim.lr=1e30", "--steps=8"], "training stopped"),
        ([*start, tmp_path / "g", "--tokenizer.path", tmp_path / "none"], "no such folder"),
        ([*start, tmp_path / "h", "--steps=0"], "steps is 0; expected at least 1"),
        ([*start, tmp_path / "h", "--data.context=1"], "data.context is 1; a block needs"),
        (["evaluate", trained, "--data.holdout=2"], "data.holdout is 2"),
    ]  # fmt: skip
    for arguments, words in cases:
        status, _, err = command(*arguments)
        assert status == 2, (arguments, err)
        assert words in err, (arguments, err)
        assert "Traceback" not in err


def test_an_unfinished_run_means_its_newest_checkpoint(command, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    finished = command("inspect", tmp_path / "run")[1]
    shutil.rmtree(tmp_path / "run" / "model")
    assert command("inspect", tmp_path / "run")[1] == finished
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    status, _, error = command("inspect", tmp_path / "run")
    assert (status, error.count("\n")) == (2, 1)


def test_the_tracker_has_the_name_that_complexity_dit_gives_it(command, tmp_path):
    (tmp_path / "old.yaml").write_text("tracker: wandb\n")
    for word in ("--report_to=wandb", "--tracker=wandb", f"--config={tmp_path}/old.yaml"):
        assert cli.PROGRAM.parse(["train", word])[1][0].report_to == "wandb"
    assert "--report_to" in command("train", "--help")[1]


def test_interrupt_exits_with_status_130(command, trained, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("complexity_lm.loading.load", stop)
    status, _, err = command("generate", trained, "--prompt=a")
    assert status == 130
    assert "interrupted" in err


def test_demo_samples_thirty_lines(trained):
    lines = sample_lines(load(str(trained)), ("Ka", "lo mi")).splitlines()  # fit into 24 tokens
    assert len([line for line in lines if not line.startswith("# --- sample")]) == 30


def test_help_lists_the_commands(command):
    status, out, _ = command("--help")
    assert status == 0
    for name in ("demo", "train", "generate", "chat", "evaluate", "tokenizer", "inspect"):
        assert name in out
