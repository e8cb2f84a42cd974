"""Prompts: as arguments of a call, encoded, guided, saved and loaded."""

import json
import subprocess
import sys
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline, FasterCacheConfig
from huggingface_hub import ModelCard

from complexity_dit import (
    ComplexityDiTImg2ImgPipeline,
    ComplexityDiTInpaintPipeline,
    ComplexityDiTPipeline,
    interpolate,
)
from complexity_dit.pipelines.model_card import write_card
from inl_core.run.errors import UserError
from support.networks import generators, randomised, small_network
from support.processes import python

# Of FasterCache, and of diffusers, which builds arrays from tensors.
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

RIVER = "a river in winter"


def paint(pipe, *prompt, **call):
    settings = {"num_inference_steps": 2, "output_type": "np", "generator": generators(0)}
    return pipe(*prompt, **(settings | call)).images


def test_a_prompt_by_position_and_by_name(text_pipe):
    image = paint(text_pipe, RIVER)
    assert image.shape == (1, 8, 8, 3)
    assert np.array_equal(image, paint(text_pipe, prompt=RIVER))
    assert not np.array_equal(image, paint(text_pipe, "a portrait"))
    nothing = paint(text_pipe)
    assert not np.array_equal(image, nothing)
    for empty in ("", None, " \n"):
        assert np.array_equal(paint(text_pipe, empty), nothing)


def test_prompts_that_are_cut_are_counted_in_one_line(text_pipe, caplog):
    with caplog.at_level("WARNING", "complexity_dit"):
        paint(text_pipe, [f"{RIVER} {i} " * 9 for i in range(3)], generator=generators(0, 1, 2))
    (record,) = caplog.records
    assert "3 of 3 prompts have more than" in record.getMessage()


def test_a_prompt_and_labels_are_combined(text_pipe, counted_pipe):
    image = paint(text_pipe, RIVER, style="Cubism")
    assert not np.array_equal(image, paint(text_pipe, RIVER))
    assert not np.array_equal(image, paint(text_pipe, style="Cubism"))
    ids = [[0, -1]]
    assert np.array_equal(image, paint(text_pipe, RIVER, class_labels=ids))
    # Labels that are not named are drawn, except beside a prompt.
    parts = text_pipe.components
    counted = ComplexityDiTPipeline(
        **parts, id2label=text_pipe.id2label, prompt_length=8,
        label_counts=counted_pipe.config.label_counts,
    )  # fmt: skip
    counted.set_progress_bar_config(disable=True)
    assert np.array_equal(paint(counted, RIVER), paint(text_pipe, RIVER))
    assert not np.array_equal(paint(counted), paint(text_pipe))


def test_lists_repetitions_and_a_generator_for_each(text_pipe):
    """Image i has the bits that it has alone: texts of other lengths do not matter."""
    prompts = ["winter", RIVER * 3, "", "a portrait"]
    options = {"chunk_size": 2, "guidance_scale": 3.0}
    together = paint(
        text_pipe, prompts, num_images_per_prompt=2, generator=generators(*range(8)), **options
    )
    assert together.shape[0] == 8
    for i in range(8):
        alone = paint(
            text_pipe, prompts[i // 2], generator=generators(i), chunk_offset=i % 2, **options
        )
        assert np.array_equal(together[i], alone[0]), i
    labelled = paint(text_pipe, RIVER, style=["Cubism", "Fauvism"], generator=generators(0, 1))
    assert len(labelled) == 2
    with pytest.raises(UserError, match="3 labels for 4 images"):
        paint(text_pipe, prompts, style=[0, 1, 2])
    with pytest.raises(UserError, match="2 prompts for 4 images"):
        paint(text_pipe, prompts, negative_prompt=["a", "b"])
    with pytest.raises(UserError, match="list of prompts is empty"):
        paint(text_pipe, [])


def test_guidance_leads_away_from_the_null_text_or_the_negative_prompt(text_pipe):
    plain = paint(text_pipe, RIVER, guidance_scale=1.0)
    guided = paint(text_pipe, RIVER, guidance_scale=3.0)
    negative = paint(text_pipe, RIVER, guidance_scale=3.0, negative_prompt="a portrait")
    assert not np.allclose(plain, guided)
    assert not np.allclose(guided, negative)
    assert np.array_equal(paint(text_pipe, RIVER, guidance_scale=3.0, negative_prompt=""), guided)
    same = paint(text_pipe, RIVER, guidance_scale=3.0, negative_prompt=RIVER)
    np.testing.assert_allclose(same, plain, atol=1e-4)


def test_autoguidance_and_internal_guidance(text_pipe):
    guide = randomised(small_network(seed=3, caption_channels=16))
    plain = paint(text_pipe, RIVER, guidance_scale=1.0)
    led = paint(text_pipe, RIVER, guidance_scale=2.0, guide=guide)
    assert not np.array_equal(led, plain)
    own = paint(text_pipe, RIVER, guidance_scale=2.0, guide=text_pipe.transformer)
    np.testing.assert_allclose(own, plain, atol=1e-4)  # no weaker prediction than its own
    with pytest.raises(UserError, match="caption_channels 0 and the transformer 16"):
        paint(text_pipe, RIVER, guide=small_network())
    network = randomised(small_network(caption_channels=16, auxiliary_layer=1))
    text_pipe.register_modules(transformer=network)
    internal = paint(text_pipe, RIVER, internal_guidance_scale=2.0)
    assert not np.allclose(internal, paint(text_pipe, RIVER))


def test_embeds_of_a_prompt(text_pipe):
    states, mask, negative, negative_mask = text_pipe.encode_prompt([RIVER, ""], "a portrait")
    assert states.shape == (2, 8, 16)
    assert mask.any(dim=1).tolist() == [True, False]
    expected = paint(
        text_pipe, [RIVER, ""], negative_prompt="a portrait", generator=generators(0, 1)
    )
    given = {
        "prompt_embeds": states, "prompt_attention_mask": mask,
        "negative_prompt_embeds": negative, "negative_prompt_attention_mask": negative_mask,
    }  # fmt: skip
    assert np.array_equal(paint(text_pipe, generator=generators(0, 1), **given), expected)
    bare = ComplexityDiTPipeline(
        text_pipe.transformer, text_pipe.scheduler, id2label=text_pipe.id2label
    )
    bare.set_progress_bar_config(disable=True)
    assert np.array_equal(paint(bare, generator=generators(0, 1), **given), expected)
    with pytest.raises(UserError, match="loaded without"):
        paint(bare, RIVER)
    tokens = int(mask[0].sum())
    short = paint(bare, prompt_embeds=states[:1, :tokens], guidance_scale=1.0)
    np.testing.assert_allclose(short, paint(text_pipe, RIVER, guidance_scale=1.0), atol=1e-4)
    for wrong, words in (
        ({"prompt_embeds": states[0]}, r"must be \(B, T, 16\)"),
        ({"prompt_embeds": states, "prompt_attention_mask": mask[:, :2]}, r"\(2, 2\) must be"),
        ({"prompt_attention_mask": mask}, "needs prompt_embeds"),
        ({"prompt": RIVER, "prompt_embeds": states}, "not both"),
    ):
        with pytest.raises(UserError, match=words):
            paint(text_pipe, **wrong)


def test_a_model_without_text_encoder_says_what_to_write(pipe):
    for prompt, words in (
        ("ukiyo e", r"style='Ukiyo_e', or on a command line --labels\.style Ukiyo_e"),
        ("portrait", "genre='portrait'"),
        ("a river", r"takes labels \(style, genre\): write style='Cubism'"),
        (["Fauvism", "Cubism"], "style='Fauvism'"),
    ):
        with pytest.raises(UserError, match=words):
            pipe(prompt)
    with pytest.raises(UserError, match="style='Cubism'"):
        pipe(style=1, negative_prompt="cubism")
    with pytest.raises(UserError, match="reads no text"):
        pipe(prompt_embeds=torch.zeros(1, 2, 16))
    plain = ComplexityDiTPipeline(small_network(label_fields=[], num_classes=[]), pipe.scheduler)
    with pytest.raises(UserError, match="neither a text encoder nor label fields"):
        plain("river")


@pytest.mark.parametrize(
    ("prompt", "words"), [("a\x07b", r"U\+0007"), (4, "4 is int"), ([RIVER, 2.5], "2.5 is float")]
)
def test_what_is_no_prompt_is_refused(text_pipe, prompt, words):
    with pytest.raises(UserError, match=words):
        text_pipe(prompt)


def test_image_to_image_and_inpainting(text_pipe):
    picture = np.random.default_rng(0).random((8, 8, 3))
    mask = np.repeat([[0.0] * 4 + [1.0] * 4], 8, axis=0)
    for cls, given in (
        (ComplexityDiTImg2ImgPipeline, {"strength": 1.0}),
        (ComplexityDiTInpaintPipeline, {"mask_image": mask}),
    ):
        pipe = cls.from_pipe(text_pipe)
        pipe.set_progress_bar_config(disable=True)
        given = given | {"image": picture}
        image = paint(pipe, prompt=RIVER, **given)
        assert not np.array_equal(image, paint(pipe, prompt="a portrait", **given))
        assert not np.array_equal(image, paint(pipe, prompt=RIVER, negative_prompt="x", **given))
        two = paint(pipe, prompt=[RIVER, "winter"], generator=generators(0, 1), **given)
        assert len(two) == 2
    new = paint(ComplexityDiTImg2ImgPipeline.from_pipe(text_pipe), prompt=RIVER, image=picture,
                strength=1.0)  # fmt: skip
    assert np.array_equal(new, paint(text_pipe, RIVER))


def test_a_strip_between_labels_keeps_its_prompt(text_pipe):
    strip = interpolate(
        text_pipe, {"style": 0}, {"style": 1}, 3, prompt=RIVER, num_inference_steps=2,
        output_type="np",
    )  # fmt: skip
    first = paint(text_pipe, RIVER, class_labels=[[0, -1]])
    np.testing.assert_allclose(strip[0], first[0], atol=1e-4)


def test_a_cache_of_diffusers(text_pipe):
    expected = paint(text_pipe, RIVER)
    text_pipe.transformer.enable_cache(
        FasterCacheConfig(
            tensor_format="BCHW",
            current_timestep_callback=lambda: text_pipe.current_timestep,
            spatial_attention_timestep_skip_range=(-1, 0),
            unconditional_batch_timestep_skip_range=(-1, 0),
            attention_weight_callback=lambda _: 0.3,
        )
    )
    np.testing.assert_allclose(paint(text_pipe, RIVER), expected, atol=1e-4)


def test_sequential_offload_reaches_the_text_encoder(text_pipe, monkeypatch):
    # diffusers adds an index to the device, and accelerate takes "cpu:0" for another than "cpu".
    def on_cpu(model, _, **options):
        return cpu_offload(model, torch.device("cpu"), **options)

    monkeypatch.setattr(accelerate, "cpu_offload", on_cpu)
    expected = paint(text_pipe, RIVER)
    text_pipe.enable_sequential_cpu_offload(device="cpu")
    for network in (text_pipe.text_encoder, text_pipe.transformer):
        assert {p.device.type for p in network.parameters()} == {"meta"}
    assert np.array_equal(paint(text_pipe, RIVER), expected)


LOAD = """
import sys

import numpy as np
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
draw = torch.Generator().manual_seed(0)
images = pipe("a river in winter", num_inference_steps=2, generator=draw, output_type="np").images
np.save(sys.argv[2], images)
"""


def test_saved_and_loaded_by_diffusers_alone(text_pipe, tmp_path):
    expected = paint(text_pipe, RIVER)
    folder = tmp_path / "model"
    text_pipe.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["text_encoder"] == ["modeling_complexity_lm", "DeepModel"]
    assert index["prompt_length"] == 8
    python("-c", LOAD, folder, tmp_path / "images.npy")
    assert np.array_equal(np.load(tmp_path / "images.npy"), expected)
    for cls in (ComplexityDiTPipeline, ComplexityDiTImg2ImgPipeline):
        again = cls.from_pretrained(folder)
        assert type(again.text_encoder).__name__ == "DeepModel"
    again.save_pretrained(tmp_path / "again")
    loaded = ComplexityDiTPipeline.from_pretrained(tmp_path / "again", dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    assert np.array_equal(paint(loaded, RIVER), expected)
    assert set(loaded.model_cpu_offload_seq.split("->")) <= set(loaded.components)
    without = ComplexityDiTPipeline.from_pretrained(folder, text_encoder=None)
    with pytest.raises(UserError, match="loaded without"):
        without(RIVER)


@pytest.mark.parametrize("cls", [ComplexityDiTPipeline, DiffusionPipeline])
def test_weights_of_16_bits_are_widened_in_every_part(text_pipe, cls, tmp_path):
    text_pipe.to(torch.bfloat16).save_pretrained(tmp_path)
    for given, dtype in (({}, torch.float32), ({"dtype": torch.bfloat16}, torch.bfloat16)):
        again = cls.from_pretrained(tmp_path, trust_remote_code=True, **given)
        assert (again.transformer.dtype, again.text_encoder.dtype) == (dtype, dtype)
        again.set_progress_bar_config(disable=True)
        assert np.isfinite(paint(again, RIVER)).all()


def test_variants_of_every_part(text_pipe, tmp_path):
    text_pipe.save_pretrained(tmp_path, variant="fp16")
    for part in ("transformer", "text_encoder"):
        names = [path.name for path in (tmp_path / part).glob("*.safetensors")]
        assert [name.split(".")[1] for name in names] == ["fp16"]
    again = ComplexityDiTPipeline.from_pretrained(tmp_path, variant="fp16")
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(paint(again, RIVER), paint(text_pipe, RIVER))


def test_prompts_are_encoded_without_the_network_and_images_painted_without_the_encoder(
    text_pipe, tmp_path
):
    text_pipe.save_pretrained(tmp_path)
    alone = ComplexityDiTPipeline.from_pretrained(tmp_path, transformer=None)
    states, mask, negative, negative_mask = alone.encode_prompt(RIVER)
    with pytest.raises(UserError, match="it can encode prompts only"):
        paint(alone, RIVER)
    bare = ComplexityDiTPipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
    bare.set_progress_bar_config(disable=True)
    image = paint(
        bare, prompt_embeds=states, prompt_attention_mask=mask, negative_prompt_embeds=negative,
        negative_prompt_attention_mask=negative_mask,
    )  # fmt: skip
    assert np.array_equal(image, paint(text_pipe, RIVER))
    for parts, words in (
        ((None, text_pipe.scheduler), "text_encoder alone"),
        ((text_pipe.transformer, None), "give the scheduler"),
    ):
        with pytest.raises(UserError, match=words):
            ComplexityDiTPipeline(*parts)


def test_an_encoder_of_transformers_is_saved_as_its_own(text_pipe, tmp_path):
    import transformers

    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=280, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    encoder = transformers.T5EncoderModel(config).eval()
    pipe = ComplexityDiTPipeline(
        text_pipe.transformer, text_pipe.scheduler, id2label=text_pipe.id2label,
        text_encoder=encoder, tokenizer=text_pipe.tokenizer, prompt_length=8,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path)
    for cls in (ComplexityDiTPipeline, DiffusionPipeline):
        again = cls.from_pretrained(tmp_path, trust_remote_code=True)
        again.set_progress_bar_config(disable=True)
        assert type(again.text_encoder) is transformers.T5EncoderModel
        assert np.array_equal(paint(again, RIVER), paint(pipe, RIVER))


def test_text_parts_that_do_not_fit_are_refused(text_pipe, pipe):
    encoder, tokenizer = text_pipe.text_encoder, text_pipe.tokenizer
    parts = {"text_encoder": encoder, "tokenizer": tokenizer, "prompt_length": 8}
    for network, changes, words in (
        (pipe.transformer, {}, "reads no text"),
        (text_pipe.transformer, {"tokenizer": None}, "needs its tokenizer"),
        (text_pipe.transformer, {"prompt_length": None}, "needs its tokenizer"),
        (text_pipe.transformer, {"prompt_length": 9}, "8 positions"),
        (small_network(caption_channels=20), {}, "16 wide and the network reads 20"),
    ):
        with pytest.raises(UserError, match=words):
            ComplexityDiTPipeline(network, pipe.scheduler, **(parts | changes))


def test_text_encoders_that_are_not_whole_are_refused(text_pipe, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    text_pipe.save_pretrained(tmp_path)
    path = tmp_path / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if k != "norm.weight"}, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks the tensor norm\.weight"):
        ComplexityDiTPipeline.from_pretrained(tmp_path)
    save_file(tensors, path, {"format": "pt"})
    ComplexityDiTPipeline.from_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    for value in (["os", "system"], ["subprocess", "Popen"], ["transformers", "AutoTokenizer"]):
        changed = index | {"text_encoder": value}
        (tmp_path / "model_index.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=f"names {value[0]}.{value[1]} as the text_encoder"):
            ComplexityDiTPipeline.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for module in ("complexity_lm.modeling_complexity", "complexity_lm"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match="text encoder needs complexity-lm: pip install"):
        ComplexityDiTPipeline.from_pretrained(tmp_path)
    given = {"text_encoder": text_pipe.text_encoder}
    again = ComplexityDiTPipeline.from_pretrained(tmp_path, **given)
    assert np.array_equal(paint(again, RIVER), paint(text_pipe, RIVER))


def test_a_pipeline_without_text_loads_neither_package(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    code = (
        "import sys\nfrom complexity_dit import ComplexityDiTPipeline\n"
        "ComplexityDiTPipeline.from_pretrained(sys.argv[1])\n"
        "print('complexity_lm' in sys.modules)\n"
    )
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True,
                         text=True, check=True)  # fmt: skip
    assert out.stdout == "False\n"


def test_encoding_for_sampling_records_no_gradients(text_pipe):
    text_pipe.text_encoder.requires_grad_(True)
    assert not any(part.requires_grad for part in text_pipe.encode_prompt(RIVER))


def test_the_code_of_a_card_runs(text_pipe, tmp_path):
    text_pipe.save_pretrained(tmp_path / "model")
    write_card(tmp_path / "model", name=str(tmp_path / "model"))
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.pipeline_tag == "text-to-image"
    assert "images from prompts and labels" in card.text
    for words in (
        "| text encoder | DeepModel |", "| length of a prompt | 8 tokens at most |",
        "packages `complexity_dit` and `complexity_lm`",
    ):  # fmt: skip
        assert words in card.text, words
    names: dict = {}
    code = card.text.split("```python\n")[1].split("```")[0]
    exec(code.replace("pipe(", "pipe(num_inference_steps=1, prompt=", 1), names)
    assert names["image"].size == (8, 8)


def test_a_card_says_what_is_recognised_of_prompts(text_pipe, tmp_path):
    text_pipe.save_pretrained(tmp_path)
    results = [
        json.loads(Path(f"docs/results/captions-128/{name}.json").read_text())
        for name in ("guided", "unguided")
    ]
    data = results[0]["settings"]["data"]
    (tmp_path / "data.json").write_text(json.dumps(data))
    write_card(tmp_path, results)
    card = (tmp_path / "README.md").read_text()
    guided, unguided, real, permuted = (
        f"{row[key]:.3g}"
        for row, key in (
            *((result["prompts"]["fields"]["genre"], "painted") for result in results),
            *((results[0]["prompts"]["fields"]["genre"], key) for key in ("real", "shuffled")),
        )
    )
    for words in (
        "| | guidance 1, internal guidance 3 at noise levels 0.3 to 1 | guidance 1 | held-out "
        "images | permuted prompts |",
        f"| genre, 10 names: share recognised | {guided} | {unguided} | {real} | {permuted} |",
        "| mean AUC of 49 words | 0.71 | 0.696 |",
        "held-out images of PATH, their captions as prompts; 20 steps",
        'Captions are composed as "{style} {genre} by {artist}: {title}".',
    ):
        assert words in card, words
