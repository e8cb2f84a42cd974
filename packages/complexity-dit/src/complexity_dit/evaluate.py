"""The evaluation: images -> features -> FID, KID, label accuracy and floors -> result.json.

One implementation for the command, the library and the training loop. The target is a pipeline
(its samples are made on the fly, asked for the label rows of the reference images), or a folder
of images; the reference is a data source (its held-out split), a folder, or kept statistics.
"""

import importlib.metadata
import json
import logging
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from complexity_dit.errors import UserError
from complexity_dit.features import (
    FEATURE_CHUNK,
    SHRUNK_FILTER,
    array_hash,
    draw,
    extract_features,
    set_features,
    shrink,
)
from complexity_dit.files import file_aside
from complexity_dit.image_sets import (
    ImageSet,
    dataset_images,
    folder_images,
    is_source,
    read_statistics,
)
from complexity_dit.inception import (
    Dtype,
    FeatureExtractor,
    Resize,
    load_extractor,
)
from complexity_dit.kid import kid_from_features
from complexity_dit.metrics import Statistics, fid_from_features, fid_to_statistics
from complexity_dit.per_label import class_means, nearest_class_mean_accuracy

if TYPE_CHECKING:
    from complexity_dit.data import DataConfig
    from complexity_dit.pipeline import ComplexityDiTPipeline
    from complexity_dit.sample import SampleConfig

logger = logging.getLogger(__name__)


@dataclass
class EvalConfig:
    """What is measured, at how many images and with which network."""

    num_images: int = 2048
    """Images of each side (n); at most what a folder or the held-out split has. Compare numbers
    at equal n only."""

    seed: int = 0
    """Seed of the draw of reference images (and so of the labels asked for) and of KID subsets."""

    weights: str = "auto"
    """Inception weights: auto (search, then a random network whose distance is named fd_random),
    random, or a path."""

    resize: Resize = "tf1"
    """How images reach 299 px: tf1 (torch-fidelity, ADM), pytorch-fid or antialias (torchmetrics).
    """

    dtype: Dtype = "float32"
    """Arithmetic in the feature network; bfloat16 is faster and only for tracking a training."""

    device: str = "auto"
    """Where everything runs: auto, cpu, cuda, cuda:1."""

    kid_subsets: int = 100
    """Random subsets KID is averaged over."""

    kid_subset_size: int = 1000
    """Images in a KID subset; reduced to n when n is smaller."""

    label_field: str | None = "style"
    """Label whose accuracy is measured (nearest class mean in feature space, fitted on training
    images); null for none."""

    floors: bool = False
    """Also measure the training split, and the held-out images shrunk to 8 px and back, against
    the held-out images."""

    cache: bool = True
    """Keep features of real images in the user's cache folder."""

    overwrite: bool = False
    """Replace a result.json that is already in the output folder."""

    quiet: bool = False
    """Print no table at the end."""


def evaluate(
    target: "str | Path | ComplexityDiTPipeline",
    reference: str | Path,
    out: str | Path | None = None,
    config: EvalConfig | None = None,
    sample: "SampleConfig | None" = None,
    data: "DataConfig | None" = None,
) -> dict[str, Any]:
    """Measure a pipeline or a folder of images against real ones.

    Args:
        target: A pipeline, its folder or Hub id, or a folder of images of one size.
        reference: ``art``, ``imagefolder:PATH`` or ``hub:NAME`` (its held-out split), a folder of
            images, or a statistics ``.npz`` with ``mu``, ``sigma`` and ``n``.
        out: Folder that gets ``result.json``; None writes nothing.
        config: What is measured.
        sample: How a pipeline paints (seed, steps, guidance, batch).
        data: How the source is read (hold-out fraction, label fields); by default as in the
            training of the pipeline, so that nothing it was trained on is held out. Its source
            and resolution are replaced by the reference's and the target's.

    Returns:
        The result, as written: ``metrics``, ``n_generated``, ``n_reference``, ``settings``,
        ``versions``, ``weights_sha256``, ``reference_fingerprint``.

    Raises:
        UserError: Fewer than 2 images on a side, a result that exists, unreadable images or
            statistics, floors without images to measure, or a setting out of range.
    """
    config = config or EvalConfig()
    if config.num_images < 2:
        raise UserError(f"num_images is {config.num_images}; a distance needs at least 2")
    result_path = Path(out) / "result.json" if out is not None else None
    if result_path and result_path.exists() and not config.overwrite:
        raise UserError(f"{result_path} exists; choose another folder or set overwrite")

    device = _device(config.device)
    subject = _open_target(target, device)
    if isinstance(subject, ImageSet):
        size, n = subject.size, min(config.num_images, len(subject))
    else:
        size, n = (subject.sample_size, subject.sample_size), config.num_images
    ref = _open_reference(str(reference), size, data or _trained_on(target))
    if config.floors and ref.images is None:
        raise UserError(f"floors need images, and {reference} holds statistics; set floors false")
    extractor = load_extractor(config.weights, config.resize, config.dtype, device)
    if ref.statistics is not None and not extractor.is_inception:
        raise UserError(f"{reference} cannot be compared with features of {extractor.name}")

    settings: dict[str, Any] = {
        "target": str(target) if isinstance(target, str | Path) else type(target).__name__,
        "reference": str(reference),
        "eval": asdict(config),
        "data": asdict(ref.data) if ref.data else None,
        "extractor": {
            "name": extractor.name,
            "weights_source": extractor.weights_source,
            "resize": extractor.resize,
            "dtype": extractor.dtype,
            "device": device.type,
            "chunk": FEATURE_CHUNK,
        },
    }
    rows = draw(len(ref.images), n, config.seed) if ref.images else np.empty(0, np.int64)
    if ref.images and len(rows) < n:
        logger.warning("the reference has %d images, fewer than n = %d", len(rows), n)
    asked: NDArray[np.int64] | None = None
    if isinstance(subject, ImageSet):
        picked = draw(len(subject), n, config.seed)
        fake = set_features(subject, picked, extractor, cache=False)
    else:
        sample = sample or _default_sample()
        settings |= {"sample": asdict(sample), **_scheduler(subject, sample)}
        labels, asked = _labels_to_ask(subject, n, ref.images, rows, config.label_field)
        fake = _sample_features(subject, labels, sample, extractor)

    # What a distance is called follows from what measured it.
    fd, kd = ("fid", "kid") if extractor.is_inception else ("fd_random", "kd_random")
    metrics: dict[str, float] = {}
    fingerprint, n_reference = "", 0
    if ref.images is not None:
        fingerprint, n_reference = ref.images.fingerprint, len(rows)
        true = set_features(ref.images, rows, extractor, config.cache)
        metrics[fd] = fid_from_features(fake, true)
        kid = kid_from_features(fake, true, config.kid_subsets, config.kid_subset_size, config.seed)
        metrics |= {f"{kd}_mean": kid.mean, f"{kd}_std": kid.std, f"{kd}_stderr": kid.stderr}
        settings["kid"] = {"subsets": kid.subsets, "subset_size": kid.subset_size}
        if asked is not None or config.floors:
            means, floors, n_train = _training_side(
                ref, rows, true, extractor, config, asked, (fd, kd)
            )
            settings["n_train"] = n_train
            if asked is not None and means is not None:
                own = ref.images.column(str(config.label_field))[rows]
                metrics["label_accuracy"] = nearest_class_mean_accuracy(fake, asked, means)
                metrics["label_accuracy_real"] = nearest_class_mean_accuracy(true, own, means)
            metrics |= floors
        if config.floors:
            settings["shrunk"] = SHRUNK_FILTER
    elif ref.statistics is not None:
        mu, sigma, n_reference = ref.statistics
        fingerprint = array_hash(mu, sigma)
        metrics[fd] = fid_to_statistics(fake, ref.statistics)
    result = {
        "metrics": metrics,
        "n_generated": len(fake),
        "n_reference": n_reference,
        "settings": settings,
        "versions": _versions(),
        "weights_sha256": extractor.weights_sha256,
        "reference_fingerprint": fingerprint,
    }
    if result_path:
        with file_aside(result_path) as scratch:
            scratch.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    if not config.quiet:
        print(format_result(result))
    return result


def format_result(result: dict[str, Any]) -> str:
    """The table that ends an evaluation on the terminal."""
    extractor = result["settings"]["extractor"]
    lines = [
        f"n = {result['n_generated']} generated, {result['n_reference']} reference images",
        f"features: {extractor['name']} ({extractor['weights_source']}), "
        f"resize {extractor['resize']}, {extractor['dtype']}",
    ]
    if "fd_random" in result["metrics"]:
        lines.append("fd_random comes from a random network: it is NOT FID and compares with none")
    width = max(map(len, result["metrics"]))
    lines += [f"  {name:<{width}}  {value:.6g}" for name, value in result["metrics"].items()]
    return "\n".join(lines)


@dataclass(frozen=True)
class _Reference:
    """Real images, with training images where the source has them, or statistics alone."""

    images: ImageSet | None = None
    train: Callable[[], ImageSet] | None = None
    statistics: Statistics | None = None
    data: "DataConfig | None" = None


def _open_target(
    target: "str | Path | ComplexityDiTPipeline", device: torch.device
) -> "ImageSet | ComplexityDiTPipeline":
    if not isinstance(target, str | Path):
        return target
    folder = Path(target)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        return folder_images(folder)
    # Imported here: two folders of images need no diffusion library.
    from complexity_dit.sample import load_pipeline

    return load_pipeline(str(target)).to(device)


def _trained_on(target: object) -> "DataConfig | None":
    """The data that a pipeline folder says it was trained on."""
    from complexity_dit.data import DataConfig
    from complexity_dit.state import DATA_FILE

    if not isinstance(target, str | Path) or not (Path(target) / DATA_FILE).is_file():
        return None
    try:
        return DataConfig(**json.loads((Path(target) / DATA_FILE).read_text()))
    except (TypeError, ValueError) as error:
        raise UserError(f"{Path(target) / DATA_FILE} is no DataConfig: {error}") from error


def _open_reference(reference: str, size: tuple[int, int], data: "DataConfig | None") -> _Reference:
    if reference.endswith(".npz"):
        return _Reference(statistics=read_statistics(Path(reference)))
    if not is_source(reference):
        return _Reference(images=folder_images(Path(reference)))
    if size[0] != size[1]:
        raise UserError(
            f"the images to evaluate are {size[1]}x{size[0]}, and {reference} is read as squares; "
            "give a folder of images as reference"
        )
    from complexity_dit.data import DataConfig, load_data

    read = replace(data or DataConfig(), source=reference, resolution=size[0])
    return _Reference(
        images=dataset_images(load_data(read, "heldout"), "held-out images"),
        train=lambda: dataset_images(load_data(read, "train"), "training images"),
        data=read,
    )


def _default_sample() -> "SampleConfig":
    from complexity_dit.sample import SampleConfig

    return SampleConfig()


def _scheduler(pipe: "ComplexityDiTPipeline", sample: "SampleConfig") -> dict[str, Any]:
    """The scheduler that paints, with its settings, and the network evaluations of a picture."""
    from complexity_dit.schedulers import count_evaluations, named_scheduler

    used = named_scheduler(pipe.scheduler, sample.scheduler, sample.shift)
    # DPM-Solver's settings have an infinity, which JSON cannot write as a number.
    config = {
        k: str(v) if isinstance(v, float) and not np.isfinite(v) else v
        for k, v in used.config.items()
        if not k.startswith("_")
    }
    evaluations = count_evaluations(
        used, sample.num_inference_steps, sample.guidance_scale, sample.guidance_interval
    )
    return {
        "scheduler": {"class": type(used).__name__, **config},
        "network_evaluations": evaluations,
    }


def _labels_to_ask(
    pipe: "ComplexityDiTPipeline",
    n: int,
    real: ImageSet | None,
    rows: NDArray[np.int64],
    label_field: str | None,
) -> tuple[torch.Tensor, NDArray[np.int64] | None]:
    """The label rows of n samples in the pipeline's ids: those of the real images drawn.

    Returns:
        Labels (n, F) int64 with -1 for not given, and the ids asked for in ``label_field`` as the
        reference numbers them, None when nothing is asked for in it.
    """
    labels = torch.full((n, len(pipe.id2label)), -1, dtype=torch.int64)
    asked = None
    for field, names in real.label_names.items() if real else ():
        if real is None or field not in pipe.id2label:
            continue
        # Fewer real images than samples: their label rows are asked for again in turn.
        wanted = real.column(field)[np.resize(rows, n)]
        ids = {name: i for i, name in pipe.id2label[field].items()}
        # The last entry is where -1, a missing label, looks.
        mapped = np.array([*(ids.get(name, -1) for name in names), -1])[wanted]
        unknown = int(((mapped < 0) & (wanted >= 0)).sum())
        if unknown:
            logger.warning(
                "%d of %d %s labels are unknown to the pipeline: not asked for", unknown, n, field
            )
        labels[:, list(pipe.id2label).index(field)] = torch.from_numpy(mapped)
        if field == label_field and (mapped >= 0).any():
            asked = np.where(mapped >= 0, wanted, -1)
    if pipe.id2label and bool((labels < 0).all()):
        logger.warning("no labels are asked for: the samples are unconditional")
    return labels, asked


def _sample_features(
    pipe: "ComplexityDiTPipeline",
    labels: torch.Tensor,
    sample: "SampleConfig",
    extractor: FeatureExtractor,
) -> NDArray[np.float32]:
    """Features of the samples of a seeded set, in the order of their indices."""
    from complexity_dit.sample import iter_samples

    done: list[int] = []

    def pictures() -> Iterator[NDArray[np.uint8]]:
        for indices, images in iter_samples(pipe, labels, sample, progress=False):
            done.extend(indices)
            yield images

    features = extract_features(pictures(), extractor, len(labels), "samples and features")
    return features[np.argsort(done)]


def _training_side(
    ref: _Reference,
    rows: NDArray[np.int64],
    true: NDArray[np.float32],
    extractor: FeatureExtractor,
    config: EvalConfig,
    asked: NDArray[np.int64] | None,
    prefixes: tuple[str, str],
) -> tuple[dict[int, NDArray[np.float64]] | None, dict[str, float], int]:
    """What the evaluation needs besides the two sides.

    Returns:
        Class means of training images (None when no labels are asked for), the floors, whose
        names start with ``prefixes``, and the number of training images used.
    """
    means, n_train = None, 0
    floors: dict[str, float] = {}
    fd, kd = prefixes
    if ref.train:
        train = ref.train()
        picked = draw(len(train), len(rows), config.seed)
        seen, n_train = set_features(train, picked, extractor, config.cache), len(picked)
        if asked is not None:
            means = class_means(seen, train.column(str(config.label_field))[picked])
        if config.floors:
            floors[f"{fd}_train"] = fid_from_features(seen, true)
            floors[f"{kd}_train"] = kid_from_features(
                seen, true, config.kid_subsets, config.kid_subset_size, config.seed
            ).mean
    if config.floors and ref.images:
        shrunk = set_features(ref.images, rows, extractor, config.cache, shrink, "shrunk")
        floors[f"{fd}_shrunk"] = fid_from_features(shrunk, true)
    return means, floors, n_train


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device is {name!r}; expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device is {name!r}, and no GPU can be used here; take auto or cpu")
    return device


def _versions() -> dict[str, str]:
    names = ("complexity-dit", "inl-core", "torch", "diffusers", "numpy", "pillow")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
