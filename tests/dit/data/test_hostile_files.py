"""Hostile files: pickles, foreign classes, decompression bombs and paths out of a data set."""

import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file, save_file

from complexity_dit.config import DataConfig
from complexity_dit.data.dataset import load_data
from complexity_dit.evaluation import image_sets as statistics_files
from complexity_dit.evaluation.image_sets import folder_images, npz_images, read_statistics
from complexity_dit.models.autoencoder import TinyAutoencoder
from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel
from complexity_dit.models.vae import load_vae
from complexity_dit.pictures import square_pixels
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.pipelines.sampling import load_pipeline
from inl_core.run.csv_log import CsvLog
from inl_core.run.errors import UserError
from support.networks import small_vae
from support.pictures import pictures, write_folder


class Trap:
    """A pickle of this writes a file when it is opened."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return Path.write_text, (self.proof, "ran")


def set_trap(path: Path, proof: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(Trap(proof)))


@pytest.fixture
def saved(pipe, tmp_path) -> Path:
    pipe.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


# -- pickles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "ckpt", "pkl"])
def test_pickled_weights_are_refused_and_not_opened(saved, tmp_path, suffix):
    proof = tmp_path / "proof"
    network = saved / "transformer"
    (network / "diffusion_pytorch_model.safetensors").unlink()
    set_trap(network / f"diffusion_pytorch_model.{suffix}", proof)
    for load in (
        lambda: load_pipeline(str(saved)),
        lambda: ComplexityDiTPipeline.from_pretrained(saved),
        lambda: ComplexityDiTTransformer2DModel.from_pretrained(network),
    ):
        with pytest.raises(UserError, match="is a pickle, which can run code and is not opened"):
            load()
    assert not proof.exists()


def test_pickles_cannot_be_asked_for(saved):
    for load in (ComplexityDiTPipeline, ComplexityDiTTransformer2DModel):
        with pytest.raises(UserError, match="only safetensors here"):
            load.from_pretrained(saved, use_safetensors=False)


def test_a_pickle_next_to_safetensors_is_not_opened(saved, tmp_path):
    set_trap(saved / "transformer" / "diffusion_pytorch_model.bin", tmp_path / "proof")
    load_pipeline(str(saved))
    assert not (tmp_path / "proof").exists()


def test_a_pickled_vae_is_refused(tmp_path):
    TinyAutoencoder(
        block_out_channels=[8, 8], layers_per_block=[1, 1], decoder_layers_per_block=[1, 1]
    ).save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    set_trap(tmp_path / "diffusion_pytorch_model.bin", tmp_path / "proof")
    with pytest.raises(UserError, match="pickle"):
        load_vae(str(tmp_path))
    (tmp_path / "config.json").unlink()  # a folder as TAESD's releases come, but of another hash
    for part in ("encoder", "decoder"):
        set_trap(tmp_path / f"tae_{part}.pth", tmp_path / "proof")
    with pytest.raises(UserError, match="it was not opened"):
        load_vae(str(tmp_path))
    assert not (tmp_path / "proof").exists()


def test_a_pickled_adapter_is_refused(saved, tmp_path):
    pytest.importorskip("peft", reason="adapters need the extra [lora]")
    set_trap(tmp_path / "adapter" / "pytorch_lora_weights.bin", tmp_path / "proof")
    pipe = load_pipeline(str(saved))
    with pytest.raises(UserError, match="safetensors"):
        pipe.load_lora_weights(tmp_path / "adapter")
    with pytest.raises(UserError, match="safetensors"):
        pipe.load_lora_weights(tmp_path / "adapter" / "pytorch_lora_weights.bin")
    assert not (tmp_path / "proof").exists()


def test_arrays_of_objects_are_refused_and_not_opened(tmp_path):
    path, proof = tmp_path / "x.npz", tmp_path / "proof"
    objects = np.array([Trap(proof)], dtype=object)
    np.savez(path, arr_0=objects, mu=objects, sigma=objects)
    for read in (npz_images, read_statistics):
        with pytest.raises(UserError, match="as a pickle, which is not opened"):
            read(path)
    assert not proof.exists()


def test_a_member_that_is_no_array_is_named(tmp_path):
    for content in (b"", b"rubbish"):
        with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            for name in ("arr_0", "mu", "sigma"):
                archive.writestr(f"{name}.npy", content)
        for read in (npz_images, read_statistics):
            with pytest.raises(UserError, match="not an array"):
                read(tmp_path / "x.npz")


# -- foreign classes, and weights that are not those of their config -------------------------------


@pytest.mark.parametrize(
    ("component", "value"),
    [
        ("transformer", ["trap", "Model"]),
        ("scheduler", ["trap", "Scheduler"]),
        ("vae", ["os", "system"]),
        ("vae", ["diffusers", "DiffusionPipeline"]),
        ("safety_checker", ["trap", "Model"]),
        ("transformer", "trap"),
    ],
)
def test_no_foreign_class_is_imported(saved, monkeypatch, tmp_path, component, value):
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = saved / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {component: value}))
    with pytest.raises(UserError, match=r"model_index\.json"):
        load_pipeline(str(saved))


def test_code_in_a_folder_does_not_run(saved):
    for shim in saved.rglob("*.py"):
        shim.write_text("raise SystemExit('ran')\n")
    load_pipeline(str(saved))


@pytest.mark.parametrize("change", [{"num_layers": 10**9}, {"hidden_size": 10**7},
                                    {"num_classes": [10**9, 2]}, {"num_layers": 1},
                                    {"patch_size": 4}])  # fmt: skip
def test_weights_unlike_their_config_are_refused_before_memory_is_taken(saved, change):
    path = saved / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=r"config\.json"):
        load_pipeline(str(saved))


def test_a_missing_tensor_is_not_drawn_at_random(saved):
    path = saved / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    lost = next(name for name in tensors if "mlp" in name)
    save_file({n: t for n, t in tensors.items() if n != lost}, path, {"format": "pt"})
    with pytest.raises(UserError, match=f"{lost} is missing"):
        load_pipeline(str(saved))


VAES = {
    "AutoencoderKL": small_vae,
    "AutoencoderTiny": AutoencoderTiny,
    "TinyAutoencoder": lambda: TinyAutoencoder(
        block_out_channels=[8, 8], layers_per_block=[1, 1], decoder_layers_per_block=[1, 1]
    ),
}


@pytest.mark.parametrize("name", VAES)
def test_every_tensor_of_a_vae_is_that_of_its_file(tmp_path, name):
    VAES[name]().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    load_vae(str(tmp_path))
    for key in sorted(tensors)[::5]:
        save_file({k: v for k, v in tensors.items() if k != key}, path)
        with pytest.raises(UserError, match="missing"):
            load_vae(str(tmp_path))


@pytest.mark.parametrize("name", VAES)
def test_a_vae_with_more_layers_than_its_weights_is_not_built(pipe, tmp_path, name):
    pipe.save_pretrained(tmp_path)
    VAES[name]().save_pretrained(tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    for key in ("layers_per_block", "num_encoder_blocks"):
        if key in config:
            several = isinstance(config[key], list)
            config[key] = [10**8] * len(config[key]) if several else 10**8
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    for load in (load_vae, ComplexityDiTPipeline.from_pretrained, load_pipeline):
        with pytest.raises(UserError, match=r"describes|has layers_per_block|has num_enc"):
            load(str(tmp_path / "vae" if load is load_vae else tmp_path))


def test_an_adapter_that_names_itself_as_its_base_ends(saved):
    (saved / "adapter.json").write_text(json.dumps({"base": ".", "base_sha256": "0"}))
    with pytest.raises(UserError, match="names another adapter as its base"):
        load_pipeline(str(saved))


# -- bombs -----------------------------------------------------------------------------------------


def test_a_zip_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics_files, "UNPACKED_LIMIT", 2**20)
    path = tmp_path / "x.npz"
    pixels = np.zeros((100, 64, 64, 3), np.uint8)  # 1.2 MB, a few KB packed
    np.savez_compressed(path, arr_0=pixels, mu=pixels, sigma=np.eye(2))
    for read in (npz_images, read_statistics):
        with pytest.raises(UserError, match=r"unpacks to .* and at most"):
            read(path)
    np.savez(path, arr_0=pixels)  # stored: read one by one, at any size
    assert len(npz_images(path)) == 100


def test_a_header_that_claims_terabytes_takes_no_memory(tmp_path):
    header = "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }\n"
    member = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
    for packed in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "x.npz", "w", packed) as archive:
            for name in ("mu", "sigma", "arr_0"):
                archive.writestr(f"{name}.npy", member)
        for read in (npz_images, read_statistics):
            with pytest.raises(UserError, match="cannot be read as"):
                read(tmp_path / "x.npz")


def test_100_megapixels_are_not_decoded(tmp_path):
    file = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(file, format="PNG")
    assert len(file.getvalue()) < 50_000
    with pytest.raises(UserError, match="DecompressionBomb"):
        square_pixels(file.getvalue(), 32)
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes(file.getvalue())
    with pytest.raises(UserError, match=r"0\.png cannot be decoded .*exceeds limit"):
        folder_images(tmp_path)


def test_an_empty_file_is_named(tmp_path):
    write_folder(tmp_path / "set", pictures(3, 1))
    (tmp_path / "set" / "0001.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"0001\.png is not an image"):
        folder_images(tmp_path / "set").read([0, 1])
    with pytest.raises(UserError, match="is not an image"):
        square_pixels(b"", 8)


def _ninety_megapixels() -> bytes:
    file = io.BytesIO()
    Image.new("1", (9_500, 9_500)).save(file, format="PNG")
    return file.getvalue()


# -- names that lead elsewhere ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../secret.png", "{secret}", "http://127.0.0.1:9/x.png", "a/../../secret.png"]
)
@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_a_picture_named_outside_its_data_set_is_not_read(tmp_path, name, form):
    folder = write_folder(tmp_path / "set", pictures(4, 1))
    write_folder(tmp_path / "other", pictures(2, 2))
    secret = tmp_path / "secret.png"
    (tmp_path / "other" / "0000.png").rename(secret)
    name = name.format(secret=secret)
    rows = [("0000.png", "a"), ("0001.png", "a"), ("0002.png", "b"), (name, "b")]
    if form == "jsonl":
        lines = [json.dumps({"file_name": n, "style": s}) for n, s in rows]
    else:
        lines = ["file_name,style", *(",".join(row) for row in rows)]
    (folder / f"metadata.{form}").write_text("\n".join(lines) + "\n")
    config = DataConfig(source=f"imagefolder:{folder}", resolution=16, holdout=0, strict=True)
    with pytest.raises(UserError, match=r"outside the data|an address|cannot read|not there"):
        load_data(config, "all")


@pytest.mark.parametrize("way", ["card", "link"])
def test_a_data_set_whose_card_names_a_file_elsewhere_is_refused(tmp_path, way):
    folder = write_folder(tmp_path / "data", pictures(4, 0))
    secret = write_folder(tmp_path / "secret", pictures(4, 1)) / "0000.png"
    if way == "card":
        (folder / "README.md").write_text(f"---\nconfigs:\n- data_files: {secret}\n---\n")
    else:
        (folder / "more.png").symlink_to(secret)
    with pytest.raises(UserError, match="lies outside"):
        load_data(DataConfig(source=f"hub:{folder}", resolution=16, holdout=0), "train")


def test_a_table_that_names_files_is_read_within_its_folder_only(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_folder(tmp_path / "secrets", pictures(2, 2))
    inside = write_folder(tmp_path / "set" / "pictures", pictures(2, 1))
    paths = [
        str(inside / "0000.png"),
        str(tmp_path / "secrets" / "0000.png"),
        "http://127.0.0.1:9/",
    ]
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    rows = [{"bytes": None, "path": path} for path in paths]
    table = pa.table({"image": pa.array(rows, image)})
    features = {"image": {"_type": "Image"}}
    about = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(table.replace_schema_metadata(about), tmp_path / "set" / "train.parquet")
    for child in inside.iterdir():  # `load_dataset` must not take them for an image folder
        child.rename(child.with_suffix(".bin"))
    config = DataConfig(source=f"hub:{tmp_path / 'set'}", resolution=16, holdout=0)
    with pytest.raises(UserError, match="none of the 3 images"):
        load_data(config, "all")


# -- other traps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["no,step\n1,2\n", "step,loss\nx,1\n", "loss\n1\n", '"\n"\n'])
def test_a_foreign_csv_is_not_replaced(tmp_path, text):
    path = tmp_path / "train_log.csv"
    path.write_text(text)
    with pytest.raises(UserError, match="is not a log of such a run"):
        CsvLog(path, ["step", "loss"], 5)
    assert path.read_text() == text


def test_the_converter_takes_no_tensor_that_would_be_repeated():
    from complexity_dit.cli.convert import from_state_dict
    from support.authors import checkpoint

    tensors = checkpoint(layers=1) | {"patch_embed.proj.bias": torch.ones(1)}
    with pytest.raises(UserError, match=r"\(1,\) in place of \(32,\)"):
        from_state_dict(tensors)
