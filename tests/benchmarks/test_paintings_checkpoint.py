"""A run as a folder of `checkpoints/`: 16 bits, guidance, a card whose numbers were measured."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.common.results import append_rows, as_rows
from benchmarks.recipe import paintings_checkpoint
from PIL import Image
from safetensors.torch import load_file

from complexity_dit import __main__ as cli
from complexity_dit.config import SHIPPED, EvalConfig, EvalSampleConfig, TextEncoderConfig
from complexity_dit.evaluation.evaluate import evaluate
from complexity_dit.models.autoencoder import TinyAutoencoder
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.pipelines.sampling import load_pipeline
from complexity_dit.training.train import train
from support.benchmark_rows import call
from support.networks import small_network
from support.processes import python

NAME, CAPTIONED = SHIPPED
WEIGHTS = "diffusion_pytorch_model.safetensors"


def measured(pipeline, out, scale=1.0, steps=2, **config):
    config = EvalConfig.brief(weights="random", quiet=True, **{"num_images": 6} | config)
    sample = EvalSampleConfig(num_inference_steps=steps, guidance_scale=scale)
    return evaluate(str(pipeline), "art", out, config, sample)


@pytest.fixture
def run(small_run) -> Path:
    train(small_run)
    return Path(small_run.out)


def test_a_run_becomes_a_folder_that_its_name_loads(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = measured(run, tmp_path / "plain", memorisation=True)
    guided = measured(run, tmp_path / "guided", 3.0)
    rows = tmp_path / "rows.csv"
    floor = {"n": (6, ""), "fd_random": (1.25, "")}
    append_rows(rows, "recipe_floor", as_rows(floor, "training paintings"))
    Image.new("RGB", (8, 8)).save(tmp_path / "grid.png")
    out = Path("checkpoints") / NAME
    arguments = (
        run, "--out", out, "--results", tmp_path / "plain", tmp_path / "guided",
        "--floors", rows, "--grid", tmp_path / "grid.png",
    )  # fmt: skip
    call(monkeypatch, paintings_checkpoint, *arguments)

    stored = load_file(out / "transformer" / WEIGHTS)
    assert {str(tensor.dtype) for tensor in stored.values()} == {"torch.bfloat16"}
    pipe, before = load_pipeline(NAME), load_pipeline(str(run))
    state = before.transformer.state_dict()
    for name, tensor in pipe.transformer.state_dict().items():
        assert tensor.dtype == state[name].dtype
        assert (tensor - state[name]).abs().max() <= state[name].abs().max() / 256
    values = {1.0: plain["metrics"]["fd_random"], 3.0: guided["metrics"]["fd_random"]}
    assert pipe.guidance["guidance_scale"] == min(values, key=values.get)

    card = (out / "README.md").read_text()
    columns = (
        ["guidance 1", "guidance 3"] if values[1.0] < values[3.0] else ["guidance 3", "guidance 1"]
    )
    assert f"| metric | {' | '.join(columns)} | training paintings |" in card
    numbers = " | ".join(f"{value:.4g}" for value in sorted(values.values()))
    assert f"| Distance of random features | {numbers} | 1.25 |" in card
    assert (
        f"| network evaluations | {' | '.join('2' if c[-1] == '1' else '4' for c in columns)} |  |"
        in card
    )
    closer = plain["memorisation"]["closer_than_1_percent"]
    for words in (
        f"With guidance 1, {closer:.2%} of 6 samples are nearer to one of",
        f"complexity-dit sample {NAME} --out", f'from_pretrained("./checkpoints/{NAME}"',
        f"`{SHIPPED[NAME]}` from the Hub", "8 steps of 4 images, 32 in all",
        "before the rounding to 16 bits", "6 samples against 6 held-out", "![Samples](samples.png)",
        "recommended guidance", "images of the embedded art set",
    ):  # fmt: skip
        assert words in card, words
    assert not [path for path in out.rglob("*.json") if str(tmp_path) in path.read_text()]

    again = tmp_path / "of the stored weights"
    measured(NAME, again)
    call(monkeypatch, paintings_checkpoint, run, "--out", tmp_path / "second", "--results", again)
    text = (tmp_path / "second" / "README.md").read_text()
    assert "| evaluated weights | as stored |" in text
    assert "| metric | value |" in text


ALONE = """
import sys

from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
print(pipe.transformer.dtype, pipe.text_encoder.dtype)
pipe("Cubism", num_inference_steps=1).images[0].save(sys.argv[2])
"""


def test_a_run_with_captions_becomes_a_folder_that_reads_prompts(
    small_run, tmp_path, monkeypatch, capsys
):
    sizes = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": 300,
    }  # fmt: skip
    encoder = TextEncoderConfig(source="lm", max_length=40, overrides=sizes)
    captions = {"caption_template": "{style} in {genre}", "label_fields": []}
    data = replace(small_run.data, **captions)
    train(replace(small_run, data=data, text_encoder=encoder))
    monkeypatch.chdir(tmp_path)
    found = measured("run", tmp_path / "plain", num_images=16, prompts=True)
    found = found["prompts"]["fields"]["style"]
    out = tmp_path / "checkpoints" / CAPTIONED
    call(monkeypatch, paintings_checkpoint, Path("run"), "--out", out, "--results", "plain")

    for folder in ("transformer", "text_encoder"):
        (weights,) = (out / folder).glob("*.safetensors")
        assert {str(tensor.dtype) for tensor in load_file(weights).values()} == {"torch.bfloat16"}
    loaded = python("-c", ALONE, out, tmp_path / "alone.png")
    assert loaded.stdout.split() == ["torch.float32"] * 2
    command = ("sample", CAPTIONED, "--prompt", "Cubism in dawn", "--num_inference_steps", "1")
    monkeypatch.setattr("sys.argv", ["complexity-dit", *command, "--out", "samples.png"])
    cli.main()
    assert "wrote 8 images" in capsys.readouterr().out

    card = (out / "README.md").read_text()
    for words in (
        f'complexity-dit sample {CAPTIONED} --prompt "a landscape with a river" --out',
        f"`{SHIPPED[CAPTIONED]}` from the Hub", "images from prompts", "of the text encoder | ",
        f"| {found['painted']:.3g} | {found['real']:.3g} | {found['shuffled']:.3g} |",
        'Captions are composed as "{style} in {genre}".',
    ):  # fmt: skip
        assert words in card, words
    written = [path for path in out.rglob("*") if path.suffix in (".json", ".md", ".py")]
    assert not [path for path in written if str(tmp_path) in path.read_text()]


def test_what_does_not_belong_together_is_refused(run, small_run, tmp_path, monkeypatch):
    measured(run, tmp_path / "plain")
    measured(run, tmp_path / "longer", steps=3)
    shutil.copytree(tmp_path / "plain", tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare/generated")
    other = replace(small_run, out=str(tmp_path / "other"), seed=1)
    train(other)
    rows, out = tmp_path / "rows.csv", tmp_path / "out"
    append_rows(rows, "recipe_floor", as_rows({"n": (7, "")}, "training paintings"))

    def refused(words, where, *results, **options):
        given = [text for name, value in options.items() for text in (f"--{name}", value)]
        with pytest.raises(SystemExit, match=words):
            call(
                monkeypatch,
                paintings_checkpoint,
                where,
                "--out",
                out,
                "--results",
                *results,
                *given,
            )
        assert not out.exists()

    refused("is no evaluation of these weights", other.out, tmp_path / "plain")
    refused("is no evaluation of these weights", run, tmp_path / "bare")
    refused("the protocols of .* differ", run, tmp_path / "plain", tmp_path / "longer")
    refused("no rows of recipe_floor for 6 pictures", run, tmp_path / "plain", floors=rows)
    refused("not a pipeline folder", tmp_path / "plain")
    monkeypatch.setattr(paintings_checkpoint, "MAX_BYTES", 1000)
    refused("at most 1,000 fit", run)


def test_the_autoencoder_keeps_its_licence_and_no_path_of_the_machine(run, tmp_path, monkeypatch):
    vae = TinyAutoencoder(
        latent_channels=4, block_out_channels=(8, 8), layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), pool_channels=0,
    )  # fmt: skip
    pipe = load_pipeline(str(run))
    names = {"style": dict(enumerate("abc")), "genre": dict(enumerate("de"))}
    latent = ComplexityDiTPipeline(
        small_network(in_channels=4), pipe.scheduler, vae, id2label=names,
        label_counts={"0 1": 5, "2 0": 3},
    )  # fmt: skip
    latent.save_pretrained(tmp_path / "weights")
    data = json.loads((run / "pipeline/data.json").read_text())
    data |= {"source": f"imagefolder:{tmp_path}/wikiart", "vae": f"{tmp_path}/vae"}
    (tmp_path / "weights/data.json").write_text(json.dumps(data))
    (tmp_path / "weights/average.json").write_text(
        json.dumps({"length": 0.1, "step": 6, "snapshots": 2, "error": 0.0})
    )
    licence = tmp_path / "licence"
    licence.write_text("MIT License\n\nCopyright\n")
    out = tmp_path / "out"
    call(
        monkeypatch, paintings_checkpoint, run, "--weights", tmp_path / "weights", "--out", out,
        "--vae_name", "TAEF2", "--vae_licence", licence,
    )  # fmt: skip
    assert (out / "vae/LICENSE").read_text() == licence.read_text()
    assert {str(t.dtype) for t in load_file(out / "vae" / WEIGHTS).values()} == {"torch.float16"}
    card = (out / "README.md").read_text()
    for words in ("TAEF2, ", "MIT License, see vae/LICENSE", "6 steps of 4 images, 24 in all",
                  "8 images of wikiart", "average of length 0.1 at step 6",
                  "**non-commercial research only**"):  # fmt: skip
        assert words in card, words
    written = [path for path in out.rglob("*") if path.suffix in (".json", ".md", ".py")]
    assert not [path for path in written if str(tmp_path) in path.read_text()]
    assert load_pipeline(str(out)).vae is not None
