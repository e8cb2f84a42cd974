"""Small models and runs that several tests share."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from complexity_dit import __main__ as cli
from complexity_dit.config import (
    DataConfig,
    EMAConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    TextEncoderConfig,
    TrainConfig,
)
from complexity_dit.models.text import build_text_encoder, text_width
from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.training.objective import build_scheduler
from support.networks import randomised, small_network
from support.pictures import pictures, write_folder

STYLES = ["Cubism", "Fauvism", "Ukiyo_e"]
GENRES = ["landscape", "portrait"]


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run a command as the shell would; returns exit status, standard output and error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["complexity-dit", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Our cache, empty, for one test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "complexity_dit"


@pytest.fixture
def weights_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leave the user's cache alone; one folder for the session, so weights convert once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def pipe() -> ComplexityDiTPipeline:
    """A two-layer pipeline on 8-pixel pictures whose every weight matters."""
    torch.manual_seed(0)
    model = ComplexityDiTTransformer2DModel(
        sample_size=8,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=4,
        label_fields=["style", "genre"],
        num_classes=[3, 2],
    ).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "adaln" in name or "proj_out" in name:
                p.normal_(std=0.1)
    names = {"style": dict(enumerate(STYLES)), "genre": dict(enumerate(GENRES))}
    pipeline = ComplexityDiTPipeline(model, build_scheduler(ObjectiveConfig()), id2label=names)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def text_pipe(pipe: ComplexityDiTPipeline) -> ComplexityDiTPipeline:
    """A pipeline with the same labels and a new complexity-lm model that reads prompts."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = TextEncoderConfig(source="lm", max_length=8, overrides=sizes | {"vocab_size": 280})
    tokenizer, encoder = build_text_encoder(config, ["a river in winter", "a portrait"])
    network = small_network(caption_channels=text_width(encoder))
    pipeline = ComplexityDiTPipeline(
        randomised(network), pipe.scheduler, id2label=pipe.id2label, text_encoder=encoder,
        tokenizer=tokenizer, prompt_length=8,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def counted_pipe(pipe: ComplexityDiTPipeline) -> ComplexityDiTPipeline:
    """The same pipeline, which knows the labels of its eight training pictures."""
    counts = {"0 0": 3, "0 1": 1, "1 1": 2, "2 -1": 2}
    names = {field: dict(enumerate(words)) for field, words in pipe.label_names.items()}
    counted = ComplexityDiTPipeline(
        pipe.transformer, pipe.scheduler, id2label=names, label_counts=counts
    )
    counted.set_progress_bar_config(disable=True)
    return counted


@pytest.fixture
def small_run(tmp_path) -> TrainConfig:
    """A run of seconds on the embedded art set."""
    return TrainConfig(
        out=str(tmp_path / "run"),
        steps=8,
        batch_size=4,
        log_every=3,
        checkpoint_every=4,
        mixed_precision="no",  # the same numbers on every kind of CPU
        data=DataConfig(resolution=16, num_images=64),
        model=ModelConfig(
            size="nano",
            dynamics_placement="branch",
            overrides={"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2},
        ),
        optim=OptimConfig(warmup_steps=2),
        ema=EMAConfig(),
    )


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """12 and 15 pictures that differ."""
    return (
        write_folder(tmp_path / "fake", pictures(12, 1)),
        write_folder(tmp_path / "real", pictures(15, 3)),
    )
