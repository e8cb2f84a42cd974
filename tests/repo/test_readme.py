"""Every Python block of the READMEs and the docs runs, page by page, on tiny models.

Where a page reads a folder that a long run would have left (`runs/demo/pipeline`), a tiny one of
the same labels lies there: what is checked is that the code is right, not what it paints.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers reads it: no waiting for a hub

import json
import re
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    "README.md",
    *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "packages").glob("*/README.md"))),
    *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").rglob("*.md"))),
]

NOT_OURS = ("trl", "torchao")
"""Packages of pages that no extra installs: a page is run up to the first that is absent."""


def python_blocks(page: str) -> list[str]:
    text = (ROOT / page).read_text()
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def save_pipeline(
    folder: Path, labels: dict[str, list[str]], captions: tuple[str, ...] = ()
) -> None:
    from complexity_dit import ComplexityDiTPipeline, ComplexityDiTTransformer2DModel
    from complexity_dit.config import ObjectiveConfig, TextEncoderConfig
    from complexity_dit.models.text import build_text_encoder, text_width
    from complexity_dit.training.objective import build_scheduler

    torch.manual_seed(0)
    text, channels = {}, 0
    if captions:
        tokenizer, encoder = build_text_encoder(TextEncoderConfig("lm", max_length=16), captions)
        text = {"tokenizer": tokenizer, "text_encoder": encoder, "prompt_length": 16}
        channels = text_width(encoder)
    model = ComplexityDiTTransformer2DModel(
        sample_size=8,
        hidden_size=32,
        num_layers=1,
        num_attention_heads=2,
        label_fields=list(labels),
        num_classes=[len(names) for names in labels.values()],
        caption_channels=channels,
    )
    names = {field: dict(enumerate(names)) for field, names in labels.items()}
    scheduler = build_scheduler(ObjectiveConfig())
    ComplexityDiTPipeline(model, scheduler, id2label=names, **text).save_pretrained(folder)


def save_language_model(folder: Path, **settings) -> None:
    from complexity_lm import DeepConfig, DeepForCausalLM
    from complexity_lm.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["def parse(text): return The reason why"] * 8, 300)
    torch.manual_seed(0)
    config = DeepConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        dynamics_controller_hidden=8,
        eos_token_id=tokenizer.eos_token_id,
        **settings,
    )
    DeepForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """A folder with what the runs of the pages would have left in it."""
    from complexity_dit.app.gallery import Gallery, Settings, picture_png
    from complexity_dit.pipelines.sampling import load_pipeline

    desk = tmp_path_factory.mktemp("desk")
    (desk / "checkpoints").symlink_to(ROOT / "checkpoints")
    art = {"style": ["Op_Art", "Orphism"], "genre": ["ocean", "dawn"]}
    save_pipeline(desk / "runs/demo/pipeline", art)
    save_pipeline(desk / "runs/mine/pipeline", {"label": ["Cubism", "Fauvism"]})
    save_pipeline(desk / "runs/captions/pipeline", {}, ("a river in winter",))
    for model in ("runs/demo-lm/model", "runs/fineweb-edu-150m/model", "runs/old/model"):
        save_language_model(desk / model)
    save_language_model(desk / "runs/loop/model", num_loops=6)
    for run in ("loop", "loop-drawn"):
        for count in (1, 2, 3, 6, 12, 24):
            folder = desk / f"runs/{run}/at-{count}"
            folder.mkdir(parents=True)
            result = {"metrics": {"bits_per_byte": 2.5}}
            (folder / "result.json").write_text(json.dumps(result))
    gallery = Gallery(load_pipeline(str(desk / "runs/demo/pipeline")))
    settings = gallery.check(Settings(labels={"style": "Op_Art"}, seed=5, num_inference_steps=2))
    *_, last = gallery.paint(settings)
    kept = picture_png(gallery, settings, last.images[0], 0)
    (desk / "gallery-Op-Art-seed-5-1.png").write_bytes(kept)
    talk = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "The reason why."},
    ]
    (desk / "talks.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 8)
    return desk


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)])
def test_python_blocks_run(page, desk, monkeypatch, capsys):
    # Of TRL's own settings.
    warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
    monkeypatch.chdir(desk)
    names = {"__name__": "example"}
    for number, code in enumerate(python_blocks(page), 1):
        for package in NOT_OURS:
            if f"from {package}" in code:
                pytest.importorskip(package, reason=f"needs pip install {package}")
        exec(compile(code, f"{page}, block {number}", "exec"), names)


def test_the_readme_shows_the_three_packages():
    blocks = python_blocks("README.md")
    assert len(blocks) == 3
    for block, package in zip(
        blocks, ("DiffusionPipeline", "generate", "INLDynamics"), strict=True
    ):
        assert package in block
        assert block.count("\n") <= 18
