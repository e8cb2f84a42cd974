"""The pipeline as a user of diffusers calls it."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)

from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline, NetworkBatches
from inl_core.run.errors import UserError
from support.networks import generators, small_vae


def generate(pipe, **kwargs):
    settings = {"num_inference_steps": 3, "output_type": "np", "generator": generators(0)}
    return pipe(**(settings | kwargs)).images


def test_labels_by_name_id_or_list(pipe):
    by_name = generate(pipe, style="ukiyo e", genre="Portrait")
    assert by_name.shape == (1, 8, 8, 3)
    assert np.array_equal(by_name, generate(pipe, style=2, genre=1))
    assert not np.array_equal(by_name, generate(pipe, style=1, genre=1))
    two = generate(pipe, style=["Cubism", None], genre="portrait", generator=generators(0, 1))
    assert two.shape[0] == 2
    assert pipe.get_label_ids(style=["Cubism", None], genre="portrait").tolist() == [
        [0, 1],
        [-1, 1],
    ]
    assert pipe.get_label_ids().tolist() == [[-1, -1]]


def test_labels_that_are_not_named_are_drawn_by_the_noise_of_an_image(counted_pipe, pipe):
    settings = {"num_images_per_prompt": 6, "chunk_size": 2}
    drawn = generate(counted_pipe, generator=generators(*range(6)), **settings)
    plain = generate(pipe, generator=generators(*range(6)), **settings)
    assert not np.array_equal(drawn, plain)
    alone = generate(counted_pipe, generator=generators(3), chunk_size=2, chunk_offset=1)
    assert np.array_equal(drawn[3:4], alone)
    known = {(0, 0), (0, 1), (1, 1), (2, -1)}
    made = [generate(pipe, class_labels=[row], generator=generators(3), chunk_size=2,
                     chunk_offset=1) for row in sorted(known)]  # fmt: skip
    assert sum(np.array_equal(alone, one) for one in made) == 1
    # Ids are taken as they are, and of style 1 all pictures have genre 1.
    for named, ids in (({"class_labels": [[-1, -1]]}, [-1, -1]), ({"style": 1}, [1, 1])):
        images = [generate(one, **named) for one in (counted_pipe, pipe)]
        expected = generate(pipe, class_labels=[ids])
        assert np.array_equal(images[0], expected), named
        assert np.array_equal(images[1], expected) == ("class_labels" in named)


def test_unknown_labels_are_refused_with_near_names(pipe):
    with pytest.raises(UserError, match="Fauvism"):
        pipe(style="Fauvsm")
    with pytest.raises(UserError, match=r"unknown label field 'syle'.*style, genre"):
        pipe(syle="Cubism")
    with pytest.raises(UserError, match="3"):
        pipe(style=7)
    with pytest.raises(UserError, match="one length"):
        pipe(style=["Cubism", "Fauvism"], genre=[0, 1, 1])


def test_guidance_acts_only_inside_its_interval(pipe):
    plain = generate(pipe, style=0, guidance_scale=1.0)
    assert not np.array_equal(plain, generate(pipe, style=0, guidance_scale=3.0))
    outside = generate(pipe, style=0, guidance_scale=3.0, guidance_interval=(0.0, 0.01))
    assert np.array_equal(plain, outside)


def test_an_image_does_not_depend_on_its_batch(pipe):
    both = generate(
        pipe, style=0, num_images_per_prompt=2, generator=generators(5, 6), chunk_size=2
    )
    alone = generate(pipe, style=0, generator=generators(6), chunk_size=2, chunk_offset=1)
    assert np.array_equal(both[1:], alone)


def test_network_batches_pad_and_keep_positions():
    sizes = []

    def network(x, y):
        sizes.append(len(x))
        return x + y + torch.arange(len(x))

    x, y = torch.arange(5.0), torch.zeros(5)
    assert NetworkBatches(4, 3).run(network, x, y).tolist() == [3.0, 1.0, 3.0, 5.0, 7.0]
    assert sizes == [4, 4]


def test_output_types_and_sizes(pipe):
    assert generate(pipe, output_type="pil")[0].size == (8, 8)
    assert generate(pipe, output_type="pt").shape == (1, 3, 8, 8)
    assert generate(pipe, output_type="latent").shape == (1, 3, 8, 8)
    assert generate(pipe, height=8, width=12).shape == (1, 8, 12, 3)
    assert isinstance(pipe(num_inference_steps=1, return_dict=False), tuple)
    for wrong in ({"height": 9}, {"num_inference_steps": 0}, {"output_type": "jpeg"},
                  {"guidance_interval": (0.9, 0.1)}, {"generator": generators(0, 1)},
                  {"latents": torch.zeros(1, 3, 4, 4)},
                  {"callback_on_step_end_tensor_inputs": ["secrets"]}):  # fmt: skip
        with pytest.raises(UserError):
            generate(pipe, **wrong)


def test_given_latents_are_used(pipe):
    latents = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(generate(pipe), generate(pipe, latents=latents, generator=None))


def test_a_callback_replaces_latents_and_interrupts(pipe):
    seen = []

    def watch(pipeline, step, timestep, tensors):
        seen.append((step, float(timestep), tensors["latents"].shape))
        pipeline._interrupt = step == 1
        return {"latents": torch.zeros_like(tensors["latents"])}

    images = generate(pipe, callback_on_step_end=watch, num_inference_steps=5)
    assert [s for s, _, _ in seen] == [0, 1]
    assert seen[0][1] == 1000.0
    assert np.array_equal(images, np.full_like(images, 0.5))


NUMPY_2 = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"  # diffusers builds arrays from tensors
)


@NUMPY_2
@pytest.mark.parametrize(
    "scheduler", [FlowMatchHeunDiscreteScheduler, DDIMScheduler, EulerDiscreteScheduler,
                  DPMSolverMultistepScheduler]
)  # fmt: skip
def test_stock_schedulers(pipe, scheduler):
    other = ComplexityDiTPipeline(pipe.transformer, scheduler(), id2label=pipe.id2label)
    other.set_progress_bar_config(disable=True)
    assert np.isfinite(generate(other)).all()


@NUMPY_2
def test_dpm_solver_and_euler_agree_at_many_steps(pipe):
    # Two correct solvers of one differential equation converge to the same image.
    euler = generate(pipe, num_inference_steps=60)
    pipe.scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=1.0
    )
    assert np.abs(generate(pipe, num_inference_steps=60) - euler).mean() < 0.02


def test_latents_are_decoded_with_the_scaling_of_the_vae(pipe):
    vae = small_vae(scaling_factor=0.5)
    latent = ComplexityDiTPipeline(pipe.transformer, pipe.scheduler, vae, pipe.id2label)
    latent.set_progress_bar_config(disable=True)
    assert latent.sample_size == 16
    images = generate(latent, output_type="pt")
    z = generate(latent, output_type="latent")
    with torch.no_grad():
        expected = (vae.decode(z / 0.5).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in accelerate's hooks
def test_offload_sequence_names_components(pipe):
    assert set(pipe.model_cpu_offload_seq.split("->")) <= set(pipe.components)


def test_save_load_and_resave(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "a")
    index = json.loads((tmp_path / "a" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_complexity_dit", "ComplexityDiTPipeline"]
    assert index["vae"] == [None, None]
    again = ComplexityDiTPipeline.from_pretrained(tmp_path / "a")
    assert again.id2label == pipe.id2label
    assert list(again.id2label) == ["style", "genre"]  # JSON would sort them
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(generate(again, style=1), generate(pipe, style=1))
    again.save_pretrained(tmp_path / "b")
    for name in ("pipeline_complexity_dit.py", "transformer/modeling_complexity_dit.py",
                 "transformer/diffusion_pytorch_model.safetensors"):  # fmt: skip
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    reloaded = ComplexityDiTPipeline.from_pretrained(tmp_path / "b")
    assert reloaded.id2label == pipe.id2label
    with pytest.warns(UserWarning, match="pickle"):
        pipe.save_pretrained(tmp_path / "c", safe_serialization=False)
    for path in (tmp_path / "a").rglob("*.safetensors"):
        other = tmp_path / "c" / path.relative_to(tmp_path / "a")
        assert other.read_bytes() == path.read_bytes()
    assert not list((tmp_path / "c").rglob("*.bin"))


def test_a_folder_loads_in_a_process_that_imports_only_diffusers(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "a")
    script = f"""
import sys, numpy, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(tmp_path / "a")!r}, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
image = pipe(style="Cubism", num_inference_steps=3, output_type="np",
             generator=torch.Generator().manual_seed(0)).images
numpy.save({str(tmp_path / "image.npy")!r}, image)
pipe.save_pretrained({str(tmp_path / "b")!r})
DiffusionPipeline.from_pretrained({str(tmp_path / "b")!r}, trust_remote_code=True)
try:
    DiffusionPipeline.from_pretrained({str(tmp_path / "b")!r})
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise AssertionError("ran code from the folder without trust_remote_code")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = generate(pipe, style="Cubism", generator=torch.Generator().manual_seed(0))
    assert np.array_equal(np.load(tmp_path / "image.npy"), expected)


def test_an_id2label_of_another_network_is_refused(pipe):
    with pytest.raises(UserError, match="id2label"):
        ComplexityDiTPipeline(pipe.transformer, pipe.scheduler, id2label={"style": {0: "x"}})


def test_unconditional_pipeline(pipe):
    from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel

    config = {**pipe.transformer.config, "label_fields": [], "num_classes": []}
    plain = ComplexityDiTPipeline(
        ComplexityDiTTransformer2DModel.from_config(config), pipe.scheduler
    )
    plain.set_progress_bar_config(disable=True)
    assert generate(plain).shape == (1, 8, 8, 3)


def test_ids_as_lists_and_arrays(pipe):
    expected = generate(pipe, class_labels=torch.tensor([[2, 1]]))
    for ids in ([[2, 1]], np.array([[2, 1]]), np.array([[2, 1]], np.int32)):
        assert np.array_equal(generate(pipe, class_labels=ids), expected)
    for labels in ({"style": np.int64(2), "genre": 1}, {"style": np.array([2]), "genre": "1"}):
        assert np.array_equal(generate(pipe, labels=labels), expected)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([207], r"shape \(1,\) must be \(images, 2\).*style, genre"),
        ([[207, 0]], "have 207 for style, whose ids are 0 to 2"),
        ([[0, -2]], "have -2 for genre"),
        ([[0.5, 0]], "must be integers"),
        ([["Cubism", 0]], "not numbers"),
        ([], r"shape \(0,\)|must be integers"),
    ],
)
def test_ids_that_are_not_in_the_tables_are_refused(pipe, ids, words):
    with pytest.raises(UserError, match=words):
        generate(pipe, class_labels=ids)


def test_a_count_that_is_no_number_is_refused(pipe):
    with pytest.raises(UserError, match=r"'Cubism' must be a whole number.*pipe\(style=...\)"):
        pipe(num_images_per_prompt="Cubism")
