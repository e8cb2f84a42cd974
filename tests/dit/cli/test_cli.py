"""Commands as typed: results, exit statuses and error messages."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from complexity_dit import __main__ as cli
from complexity_dit.cli.demo import demo_config
from complexity_dit.config import ModelConfig, TrainConfig
from complexity_dit.models.autoencoder import TinyAutoencoder

SMALL = [
    "--steps=2", "--batch_size=4", "--log_every=1", "--checkpoint_every=2", "--data.num_images=64",
    "--data.resolution=16", "--model.size=nano", "--optim.warmup_steps=1",
    "--model.overrides={hidden_size: 32, num_layers: 1, num_attention_heads: 2}",
]  # fmt: skip


@pytest.fixture
def paintings(tmp_path):
    """Six readable paintings of two styles, a broken file and one that is too small."""
    folder = tmp_path / "paintings"
    draw = np.random.default_rng(0)
    for style in ("Cubism", "Fauvism"):
        (folder / style).mkdir(parents=True)
        for i in range(3):
            pixels = draw.integers(0, 255, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / style / f"{i}.png")
    data = (folder / "Cubism" / "0.png").read_bytes()
    (folder / "Cubism" / "truncated.png").write_bytes(data[: len(data) // 2])
    Image.new("RGB", (8, 8)).save(folder / "Fauvism" / "small.png")
    return folder


def test_train_sample_and_evaluate(command, tmp_path):
    out = tmp_path / "run"
    assert command("train", "--out", out, *SMALL)[0] == 0
    assert sorted(p.name for p in out.iterdir()) == [
        ".complexity-dit-run", "checkpoints", "config.yaml", "logs", "noise_levels.csv", "pipeline",
        "train_log.csv",
    ]  # fmt: skip
    status, text, _ = command(
        "sample", out / "pipeline", "--out", tmp_path / "a.png", "--labels.style", "Op_Art",
        "Orphism", "--num_images=16", "--num_inference_steps=1",
    )  # fmt: skip
    assert status == 0, text
    assert "16 images" in text
    status, text, _ = command(
        "evaluate", out / "pipeline", "--reference=art", "--out", tmp_path / "eval",
        "--num_images=8", "--weights=random", "--sample.num_inference_steps=1",
        "--data.num_images=64",
    )  # fmt: skip
    assert status == 0
    assert "NOT FID" in text
    assert (tmp_path / "eval" / "result.json").exists()


def test_demo_yaml_is_the_demo():
    _, (config,), _ = cli.PROGRAM.parse(["train", "--config=configs/dit/demo.yaml"])
    assert config == demo_config(TrainConfig().out)
    assert replace(config, model=ModelConfig()) == TrainConfig()


@pytest.mark.parametrize("name", sorted(path.stem for path in Path("configs/dit").glob("*.yaml")))
def test_committed_configs_parse(command, name):
    verb = "autoencoder" if name == "autoencoder" else "train"
    status, text, _ = command(verb, f"--config=configs/dit/{name}.yaml", "--print_config")
    assert status == 0
    assert yaml.safe_load(text)["data"]["resolution"] > 0


def test_encode_and_train(command, paintings, tmp_path):
    vae = TinyAutoencoder(
        latent_channels=4, block_out_channels=(8, 8), layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), pool_channels=0,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    cache = tmp_path / "latents"
    encode = [
        "encode", f"--source=imagefolder:{paintings}", "--resolution=16", "--holdout=0", "--out",
    ]  # fmt: skip
    status, text, _ = command(*encode, cache, f"--vae={tmp_path}/vae")
    assert status == 0
    assert str(cache) in text
    train = ["train", *SMALL, "--data.holdout=0", f"--data.source=latents:{cache}", "--out"]
    assert command(*train, tmp_path / "run")[0] == 0
    assert (tmp_path / "run" / "pipeline" / "vae" / "config.json").is_file()
    for arguments, message in (
        ([*encode, tmp_path / "a"], "--vae is missing"),
        ([*encode, tmp_path / "a", f"--vae={tmp_path}/no"], "there is no VAE folder"),
        ([*train, tmp_path / "b", "--data.resolution=32"], "set data.resolution to it"),
    ):
        status, _, error = command(*arguments)
        assert (status, error.count("\n")) == (2, 1)
        assert message in error


def test_help_shows_the_docstrings_of_fields(command):
    _, text, _ = command("train", "--help")
    for words in ("Peak learning rate", "Fraction held out", "Where INL dynamics act"):
        assert words in " ".join(text.split())


def test_version(command):
    from complexity_dit import __version__

    assert __version__ in command("--version")[1]


def test_broken_and_small_images_are_reported(command, paintings, tmp_path, caplog):
    source = f"--data.source=imagefolder:{paintings}"
    args = [*SMALL, source, "--data.holdout=0", "--out", tmp_path / "run"]
    assert command("train", *args)[0] == 0
    assert "truncated.png" in caplog.text
    assert "small.png" in caplog.text
    assert "8×8" in caplog.text
    status, _, err = command("train", *args[:-1], tmp_path / "strict", "--data.strict=true")
    assert status == 2
    assert "truncated.png" in err or "small.png" in err


def test_wrong_input_exits_with_2_and_a_hint(command, tmp_path, paintings):
    out = tmp_path / "run"
    assert command("train", "--out", out, *SMALL)[0] == 0
    pipeline = out / "pipeline"
    (tmp_path / "empty").mkdir()
    paint = ["sample", pipeline, "--out"]
    start = ["train", *SMALL, "--out"]
    wider = ["--model.size=tiny", "--model.overrides={num_layers: 1}", "--resume=auto"]
    empty = f"--data.source=imagefolder:{tmp_path}/empty"
    cases = [
        ([*paint, tmp_path / "a.png", "--labels.style", "Orfism"], "Orphism"),
        ([*paint, tmp_path / "d.png", "--height=17"], "multiples of 4"),
        ([*start, tmp_path / "b", empty], "no images"),
        ([*start, tmp_path / "c", "--model.patch_size=5"], "16 must be divisible by patch_size 5"),
        ([*start, out], "--resume auto"),
        ([*start, out, *wider], "was trained with other settings"),
        ([*start, tmp_path / "e", "--optim.lr=1e30", "--steps=8"], "training stopped"),
        ([*start, tmp_path / "f", "--data.source=wikiart"], "imagefolder:PATH"),
        ([*start, tmp_path / "g", "--optim.lrr=1"], "lrr"),
        ([*start, tmp_path / "h", "--batch_size=many"], "batch_size"),
    ]
    for arguments, words in cases:
        status, _, err = command(*arguments)
        assert status == 2, arguments
        assert words in err, (arguments, err)
        assert "Traceback" not in err


def test_label_lists_are_joined():
    words = ["--labels.style", "A", "[B", "--seed", "1", "--labels.genre=x"]
    _, (config, *_), options = cli.PROGRAM.parse(["sample", "pipe", "--out=x", *words])
    assert options["labels"] == {"style": ["A", "[B"], "genre": ["x"]}
    assert config.seed == 1


def test_interrupted_evaluation_leaves_no_result(command, tmp_path, paintings, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("complexity_dit.evaluation.evaluate.fid_from_features", stop)
    shutil.rmtree(paintings / "Fauvism")
    (paintings / "Cubism" / "truncated.png").unlink()
    status, _, err = command(
        "evaluate", paintings / "Cubism", "--reference", paintings / "Cubism",
        "--weights=random", "--out", tmp_path / "eval",
    )  # fmt: skip
    assert status == 130
    assert "interrupted" in err
    assert not (tmp_path / "eval" / "result.json").exists()
