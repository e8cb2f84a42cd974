"""Adapters for paintings of a style that the base does not have: trained, loaded, merged."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from huggingface_hub import ModelCard
from peft import LoraConfig
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from complexity_dit.cli.inspect import inspect
from complexity_dit.config import DataConfig, LoraOptions, ObjectiveConfig, OptimConfig, TrainConfig
from complexity_dit.data.encode import encode
from complexity_dit.data.latents import load_training_data
from complexity_dit.pipelines.image_to_image import read_pictures
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline, NetworkBatches
from complexity_dit.pipelines.sampling import load_pipeline
from complexity_dit.training.network import adapt
from complexity_dit.training.train import train
from inl_core.run.errors import UserError
from support.outcomes import last_checkpoint, tensor_files

WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture
def paintings(tmp_path) -> Path:
    """Six pictures without labels."""
    folder = tmp_path / "paintings"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for i in range(6):
        pixels = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def run(pipe, paintings, tmp_path) -> TrainConfig:
    pipe.save_pretrained(tmp_path / "base")
    return TrainConfig(
        mixed_precision="no",
        out=str(tmp_path / "run"),
        init_from=str(tmp_path / "base"),
        steps=6,
        batch_size=4,
        log_every=2,
        checkpoint_every=3,
        data=DataConfig(source=f"imagefolder:{paintings}", resolution=8, holdout=0.0),
        objective=ObjectiveConfig(network_output="target"),
        optim=OptimConfig(lr=0.05, warmup_steps=1),
        lora=LoraOptions(rank=2, labels={"style": "Hokusai v. 2"}),
    )


def paint(pipe, **labels):
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np",
        guidance_scale=1.0, **labels,
    ).images  # fmt: skip


def test_a_new_style_is_learned_and_merged(pipe, run, tmp_path):
    adapter = train(run)
    assert adapter == tmp_path / "run" / "adapter"
    with safe_open(adapter / WEIGHTS, "pt") as file:
        keys = set(file.keys())
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    assert "transformer.label_embed.style.Hokusai v. 2" in keys
    assert "transformer.blocks.1.attn.to_out.0.lora_B.weight" in keys
    assert all("lora_" in key or "label_embed" in key for key in keys)
    assert settings["transformer.r"] == 2

    base = ComplexityDiTPipeline.from_pretrained(run.init_from)
    before = paint(base, style="Cubism")
    with pytest.raises(UserError, match="is not one of its 3 names"):
        base.get_label_ids(style="Hokusai v. 2")
    base.load_lora_weights(adapter)
    assert base.label_names["style"] == [*pipe.label_names["style"], "Hokusai v. 2"]
    new = paint(base, style="hokusai v. 2", genre="portrait")
    assert np.abs(new - paint(base, genre="portrait")).max() > 1e-4  # the row was learned
    assert np.abs(paint(base, style="Cubism") - before).max() > 1e-4  # and the matrices
    base.disable_lora()
    assert np.array_equal(paint(base, style="Cubism"), before)
    base.enable_lora()

    # Merged, unloaded, saved and loaded again it paints the same, without PEFT's layers.
    base.fuse_lora()
    np.testing.assert_allclose(paint(base, style="Hokusai v. 2", genre="portrait"), new, atol=1e-5)
    base.unload_lora_weights()
    base.save_pretrained(tmp_path / "merged")
    merged = ComplexityDiTPipeline.from_pretrained(tmp_path / "merged")
    assert merged.transformer.config.num_classes == [4, 2]
    assert merged.label_names == base.label_names
    assert not any("lora" in name for name, _ in merged.transformer.named_parameters())
    for one in (base, merged):
        np.testing.assert_allclose(
            paint(one, style="Hokusai v. 2", genre="portrait"), new, atol=1e-5
        )


def test_only_the_adapter_is_trained(pipe, run):
    train(run)
    checkpoint = last_checkpoint(run.out)
    trained = load_file(checkpoint / "model.safetensors")
    assert all("lora_" in n or n == "label_embed.style.added.default" for n in trained)
    assert trained["label_embed.style.added.default"].shape == (1, 32)
    moments = load_file(checkpoint / "optimizer.safetensors")
    assert len(moments) == 3 * len(trained)  # two moments and a step each, of nothing else
    # Loaded and taken out again, the base is what it was, bit for bit.
    one = ComplexityDiTPipeline.from_pretrained(run.init_from)
    one.load_lora_weights(checkpoint / "adapter")
    one.unload_lora_weights()
    assert one.label_names == pipe.label_names
    for (name, p), (other, q) in zip(
        one.transformer.named_parameters(), pipe.transformer.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(p, q)


def test_resume_is_bit_identical_and_the_average_is_not_the_weights(run, resumed_as_straight):
    resumed_as_straight(run)
    last = last_checkpoint(Path(run.out).with_name("stopped"))
    assert {f"adapter/{WEIGHTS}", "ema.safetensors"} < set(tensor_files(last))
    raw, ema = (load_file(last / f"{n}.safetensors") for n in ("model", "ema"))
    assert any(not torch.equal(raw[k], ema[k]) for k in raw)


def test_only_names_that_the_base_does_not_have_add_rows(pipe, run, paintings, tmp_path):
    rows = ["file_name,style,genre", *(f"{i}.png,{'Cubism' if i % 2 else 'Vorticism'},portrait"
                                       for i in range(6))]  # fmt: skip
    (paintings / "metadata.csv").write_text("\n".join(rows) + "\n")
    data = dataclasses.replace(run.data, label_fields=["style", "genre"])
    adapter = train(dataclasses.replace(run, data=data, lora=LoraOptions(rank=2)))
    rows = [k for k in load_file(adapter / WEIGHTS) if "label_embed" in k]
    assert rows == ["transformer.label_embed.style.Vorticism"]
    base = ComplexityDiTPipeline.from_pretrained(run.init_from)
    base.load_lora_weights(adapter)
    assert base.get_label_ids(style=["Cubism", "Vorticism"]).tolist() == [[0, -1], [3, -1]]


def test_commands_accept_an_adapter_folder_as_a_pipeline(run, tmp_path):
    adapter = train(run)
    pipe = load_pipeline(str(adapter))
    assert "Hokusai v. 2" in pipe.label_names["style"]
    assert inspect(run.out)["labels"] == {"style": 4, "genre": 2}
    about = json.loads((adapter / "adapter.json").read_text())
    assert about["base"] == "../../base"  # the folders can be moved together
    assert about["labels"] == {"style": ["Hokusai v. 2"]}
    assert DataConfig(**json.loads((adapter / "data.json").read_text())) == run.data
    card = ModelCard.load(adapter / "README.md")
    assert "lora" in card.data.tags
    assert card.data.base_model is None  # a folder of this machine is none of the Hub's
    assert 'from_pretrained("./base")' in card.text
    assert 'pipe(labels={"style": "Hokusai v. 2"})' in card.text
    weights = Path(run.init_from) / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["proj_out.bias"] += 1
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(UserError, match="trained on other weights"):
        load_pipeline(str(adapter))
    with pytest.raises(UserError, match="adapter of another network"):
        train(dataclasses.replace(run, steps=7, resume="auto"))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # PEFT, of two
def test_adapters_are_named_mixed_and_deleted(run, tmp_path):
    first = train(run)
    other = LoraOptions(rank=3, labels={"style": "Rimpa"})
    second = train(dataclasses.replace(run, out=str(tmp_path / "other"), lora=other))
    pipe = ComplexityDiTPipeline.from_pretrained(run.init_from)
    pipe.load_lora_weights(first, adapter_name="first")
    alone = paint(pipe, style="Hokusai v. 2")
    pipe.load_lora_weights(second, adapter_name="second")
    assert pipe.label_names["style"][3:] == ["Hokusai v. 2", "Rimpa"]
    with pytest.raises(UserError, match="brings style 'Rimpa', which this pipeline has"):
        pipe.load_lora_weights(second, adapter_name="third")
    pipe.set_adapters(["first", "second"], [1.0, 0.0])
    np.testing.assert_allclose(paint(pipe, style="Hokusai v. 2"), alone, atol=1e-6)
    pipe.delete_adapters("first")
    assert pipe.label_names["style"][3:] == ["Rimpa"]
    assert pipe.get_label_ids(style="Rimpa").tolist() == [[3, -1]]
    with pytest.raises(UserError, match="merge it first"):
        pipe.save_pretrained(tmp_path / "half")
    pipe.fuse_lora()
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert pipe.label_names["style"] == ["Cubism", "Fauvism", "Ukiyo_e"]


def test_a_model_alone_loads_and_saves_its_adapter(run, tmp_path):
    adapter = train(run)
    pipe = ComplexityDiTPipeline.from_pretrained(run.init_from)
    pipe.transformer.load_lora_adapter(str(adapter), adapter_name="mine")
    expected = paint(pipe, style="Hokusai v. 2")
    pipe.transformer.save_lora_adapter(tmp_path / "saved", adapter_name="mine")
    pipe.transformer.unload_lora()
    pipe.transformer.load_lora_adapter(str(tmp_path / "saved"), prefix=None)
    assert np.array_equal(paint(pipe, style="Hokusai v. 2"), expected)


def test_wrong_adapters_are_refused(pipe, run, tmp_path):
    adapter = train(run)
    with pytest.raises(UserError, match="there is no adapter in"):
        pipe.load_lora_weights(tmp_path / "nowhere")
    (tmp_path / "pickle").mkdir()
    torch.save({"a": torch.zeros(1)}, tmp_path / "pickle" / "pytorch_lora_weights.bin")
    with pytest.raises(UserError, match="there is no adapter in"):
        pipe.load_lora_weights(tmp_path / "pickle")
    with pytest.raises(UserError, match="only safetensors"):
        pipe.load_lora_weights(adapter, use_safetensors=False)
    with pytest.raises(UserError, match="begins with 'transformer'"):
        pipe.load_lora_weights({"unet.to_q.lora_A.weight": torch.zeros(2, 32)})
    tensors = load_file(adapter / WEIGHTS)
    names, parameters = pipe.label_names, pipe.transformer.state_dict().keys()
    for key, words in (
        ("transformer.blocks.0.attn.to_q.lora_A.weight", "does not fit this network"),
        ("transformer.label_embed.style.Hokusai v. 2", r"of shape \(5,\).*\(32,\)"),
    ):
        wrong = tensors | {key: torch.zeros(*tensors[key].shape[:-1], 5)}
        with pytest.raises(UserError, match=words):
            pipe.load_lora_weights(wrong)
        assert pipe.label_names == names
        # Nothing is left of it: the network could be saved.
        assert pipe.transformer.state_dict().keys() == parameters
    field = {k.replace("style", "medium"): v for k, v in tensors.items()}
    with pytest.raises(UserError, match="of the field 'medium'; the network has style, genre"):
        pipe.load_lora_weights(field)


def adapter_of(pipe, **changes):
    """Tensors of a new adapter whose every matrix matters, and PEFT's settings with changes."""
    network = ComplexityDiTPipeline(pipe.transformer, pipe.scheduler, None, pipe.id2label)
    network.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    torch.manual_seed(3)
    tensors = {
        name: torch.randn_like(tensor)
        for name, tensor in network.transformer.adapter_state_dict().items()
    }
    settings = network.transformer.adapter_settings() | changes
    network.transformer.unload_lora()
    return tensors, settings


ENDLESS = "(.*.*.*.*.*.*.*.*.*.*)+x$"


def test_settings_of_an_adapter_cannot_hang_import_or_allocate(pipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "antigravity", None)  # an import of it would raise
    tensors, plain = adapter_of(pipe)
    pipe.transformer.load_lora_adapter(tensors, prefix=None, metadata=plain)
    expected = paint(pipe, style=0)
    pipe.unload_lora_weights()
    for changes in (
        {"target_modules": ENDLESS}, {"exclude_modules": ENDLESS}, {"layers_pattern": [ENDLESS]},
        {"layers_to_transform": [0]}, {"modules_to_save": ["adaln"]}, {"target_parameters": ["x"]},
        {"megatron_config": {}, "megatron_core": "antigravity"}, {"init_lora_weights": "pissa"},
        {"layer_replication": [[0, 10**8]]}, {"loftq_config": {"x": 1}}, {"task_type": "CAUSAL_LM"},
        {"trainable_token_indices": [10**9]}, {"eva_config": {"rho": 9}}, {"lora_alpha": 8.0},
    ):  # fmt: skip
        settings = plain | changes
        pipe.transformer.load_lora_adapter(tensors, prefix=None, metadata=settings)
        assert np.array_equal(paint(pipe, style=0), expected), changes
        pipe.unload_lora_weights()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 10**9}, "rank 1000000000 for .*its tensors have 2"),
        ({"rank_pattern": {ENDLESS: 2}}, "names of layers, not regular expressions"),
        ({"alpha_pattern": {ENDLESS: 2}}, "names of layers, not regular expressions"),
        ({"alpha_pattern": [1]}, "not what PEFT writes"),
        ({"lora_alpha": "8"}, "not what PEFT writes"),
        ({"lora_alpha": float("nan")}, "not what PEFT writes"),
    ],
)
def test_settings_that_contradict_the_tensors_are_refused(pipe, changes, words):
    tensors, settings = adapter_of(pipe, **changes)
    with pytest.raises(UserError, match=words):
        pipe.transformer.load_lora_adapter(tensors, prefix=None, metadata=settings)


def test_tensors_of_no_layer_are_refused_by_name(pipe):
    tensors, settings = adapter_of(pipe)
    for name in (f"{ENDLESS}.lora_B.weight", "blocks.9.attn.to_q.lora_B.weight"):
        for metadata in (None, settings):
            with pytest.raises(UserError, match="which the network has not"):
                pipe.transformer.load_lora_adapter(
                    tensors | {name: torch.zeros(4, 3)}, prefix=None, metadata=metadata
                )


@pytest.mark.parametrize("of_pipeline", [True, False])
def test_unfusing_undoes_the_scale(pipe, of_pipeline):
    tensors, settings = adapter_of(pipe)
    plain = paint(pipe, style=0)
    pipe.transformer.load_lora_adapter(tensors, prefix=None, metadata=settings)
    loaded = paint(pipe, style=0)
    assert np.abs(loaded - plain).max() > 1e-3
    one = pipe if of_pipeline else pipe.transformer
    for _ in range(2):
        one.fuse_lora(lora_scale=0.5)
        one.unfuse_lora()
    np.testing.assert_allclose(paint(pipe, style=0), loaded, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"init_from": None}, "name it with --init_from"),
        ({"lora": {"rank": -1}}, "lora.rank -1"),
        ({"lora": {"dropout": 1.0}}, "lora.dropout 1.0"),
        ({"lora": {"targets": []}}, "lora.targets is empty"),
        ({"lora": {"targets": ["to_x"]}}, "to_x"),
        ({"lora": {"labels": {"school": "Kano"}}}, "no label field 'school'"),
        ({"objective": {"prediction_type": "epsilon"}}, "prediction_type flow"),
        ({"objective": {"network_output": "sample"}}, "network_output target"),
        ({"data": {"resolution": 4}}, "set data.resolution 8"),
    ],
)
def test_settings_that_do_not_fit_the_base_are_refused(run, changes, words):
    def changed_run():
        groups = {
            name: dataclasses.replace(getattr(run, name), **value) if value else value
            for name, value in changes.items()
        }
        return train(dataclasses.replace(run, **groups))

    with pytest.raises(UserError, match=words):
        changed_run()


def test_the_command_line_names_the_style(run, tmp_path, capsys):
    from complexity_dit.__main__ import run as command

    command(
        ["train", "--init_from", run.init_from, "--out", str(tmp_path / "cli"), "--steps", "2",
         "--batch_size", "2", "--data.source", run.data.source, "--data.resolution", "8",
         "--data.holdout", "0", "--objective.network_output", "target", "--lora.rank", "1",
         "--lora.labels.style", "Kano_school", "--lora.targets", "[to_q]"]
    )  # fmt: skip
    assert "the adapter is in" in capsys.readouterr().out
    tensors = load_file(tmp_path / "cli" / "adapter" / WEIGHTS)
    assert {name.split(".")[-1] for name in tensors} == {"weight", "Kano_school"}
    assert not any("to_k" in name for name in tensors)
    with pytest.raises(UserError, match="plan counts full networks"):
        command(["plan", "--lora.rank", "4"])


def test_latents_are_scaled_as_for_the_base(pipe, paintings, tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=3,
    )  # fmt: skip
    mean, std = [0.1, 0.2, -0.3], [0.5, 2.0, 1.5]
    base = ComplexityDiTPipeline(
        pipe.transformer, pipe.scheduler, vae, pipe.id2label, latents_mean=mean, latents_std=std
    )
    base.save_pretrained(tmp_path / "base")
    for picture in paintings.iterdir():
        Image.open(picture).resize((16, 16)).save(picture)
    pictures = DataConfig(
        source=f"imagefolder:{paintings}", resolution=16, holdout=0.0, flip=False,
        vae=str(tmp_path / "base"),
    )  # fmt: skip
    encode(pictures, str(tmp_path / "latents"))
    config = TrainConfig(
        mixed_precision="no",
        init_from=str(tmp_path / "base"),
        out=str(tmp_path / "run"), steps=2, batch_size=2,
        data=dataclasses.replace(pictures, source=f"latents:{tmp_path / 'latents'}"),
        objective=ObjectiveConfig(network_output="target"),
        lora=LoraOptions(rank=1, labels={"style": "Hokusai"}),
    )  # fmt: skip
    _, parts, data, _ = adapt(config, load_training_data(config.data), None)
    with torch.no_grad():
        latents = base._encode(read_pictures(Image.open(paintings / "0.png"), None, None),
                               NetworkBatches(None, 0))  # fmt: skip
    scaled = data.clean(range(6), torch.zeros(6, dtype=torch.bool))
    assert min(float((x - latents[0]).abs().max()) for x in scaled) < 2e-3  # half precision
    assert parts.latent_space.mean == mean
    loaded = load_pipeline(str(train(config)))
    assert loaded.vae is not None
    assert "Hokusai" in loaded.label_names["style"]
    pixels = dataclasses.replace(config, data=dataclasses.replace(pictures, vae=None))
    with pytest.raises(UserError, match="is trained on latents"):
        train(dataclasses.replace(pixels, out=str(tmp_path / "pixels")))
