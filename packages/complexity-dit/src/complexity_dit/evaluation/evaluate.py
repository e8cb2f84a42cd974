"""The evaluation: images, features, distances, then result.json and a report.

The command, the library and the training loop share this implementation. The target is a pipeline,
whose samples are generated with the labels of the reference images, or it is the images of a
folder, an ``.npz`` or the training split of a data source. The reference is a data source (its
held-out split), images, or stored statistics. With several processes, each takes a part of the
images.
"""

import importlib.metadata
import json
import logging
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from complexity_dit.config import DataConfig, EvalConfig, SampleConfig
from complexity_dit.distributed import (
    is_main,
    main_first,
    on_main,
    pick_device,
    report_dead_evaluation_workers,
)
from complexity_dit.evaluation.breakdown import (
    SHRUNK_FILTER,
    Memorisation,
    class_means,
    distances_by_label,
    memorisation,
    nearest_class_mean_accuracy,
    shrink,
    vae_reconstruction,
)
from complexity_dit.evaluation.distances import (
    DENSITY_NEIGHBOURS,
    PRECISION_NEIGHBOURS,
    KernelEstimate,
    bootstrap,
    distance_of_sets,
    feature_statistics,
    fid_curve,
    fid_from_features,
    fid_to_statistics,
    inception_score,
    kid_from_features,
    manifold_overlap,
)
from complexity_dit.evaluation.features import FEATURE_CHUNK, draw, set_features
from complexity_dit.evaluation.image_sets import (
    ImageSet,
    KeptStatistics,
    Reference,
    array_images,
    labels_for_samples,
    labels_in_reference_ids,
    open_reference,
    open_target,
    trained_on,
    write_statistics,
)
from complexity_dit.evaluation.networks import FeatureExtractor, load_extractor
from complexity_dit.evaluation.report import Pictures, format_result, write_report
from complexity_dit.evaluation.samples import generated_images
from complexity_dit.hashing import array_hash
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.pipelines.sampling import scheduler_settings
from inl_core.run.errors import UserError
from inl_core.run.files import atomic_file

logger = logging.getLogger(__name__)

Features = NDArray[np.float32]
Rows = NDArray[np.int64]

SAMPLES_FOLDER = "generated"


def evaluate(
    target: str | Path | ComplexityDiTPipeline,
    reference: str | Path,
    out: str | Path | None = None,
    config: EvalConfig | None = None,
    sample: SampleConfig | None = None,
    data: DataConfig | None = None,
) -> dict[str, Any]:
    """Measure a pipeline or a set of images against real images.

    Args:
        target: A pipeline, its folder or Hub id; a folder of images of one size; an ``.npz`` with
            ``arr_0``; or a data source, whose training split is measured.
        reference: ``art``, ``imagefolder:PATH`` or ``hub:NAME`` (its held-out split), a folder of
            images, or an ``.npz`` of images (``arr_0``) or of statistics (``mu``, ``sigma``).
        out: Folder for ``result.json``, ``report.html`` and the samples; None writes nothing.
        config: What is measured.
        sample: How a pipeline is sampled (seed, steps, guidance, batch).
        data: How a source is read (held-out fraction, label fields); by default as in the training
            of the pipeline, so that none of its training images is held out. Its source and
            resolution are replaced by those of the reference and the target.

    Returns:
        The result as written, on every process: ``metrics``, ``absent`` (what could not be
        measured, and why), ``fid_over_n``, ``per_label``, ``memorisation``, ``n_generated``,
        ``n_reference`` (None if the statistics do not contain it), ``settings``, ``versions``,
        ``weights_sha256``, ``reference_fingerprint``, ``target_fingerprint``.

    Raises:
        UserError: Fewer than 2 images on a side, an existing result, unreadable images or
            statistics, statistics of another extractor, floors for a reference without images, a
            setting out of range, or another process that has died.
    """
    config = config or EvalConfig()
    with report_dead_evaluation_workers():
        folder = Path(out) if out is not None else None
        return _evaluate(target, str(reference), folder, config, sample or SampleConfig(), data)


def _evaluate(
    target: str | Path | ComplexityDiTPipeline,
    reference: str,
    folder: Path | None,
    config: EvalConfig,
    sample: SampleConfig,
    data: DataConfig | None,
) -> dict[str, Any]:
    if folder and (folder / "result.json").exists() and not config.overwrite:
        raise UserError(f"{folder / 'result.json'} exists; choose another folder or set overwrite")
    device = pick_device(config.device)
    data = data or trained_on(target)
    subject = open_target(target, device, data)
    if isinstance(subject, ImageSet):
        size, n = subject.size, min(config.num_images, len(subject))
    else:
        side = subject.sample_size
        size, n = (sample.height or side, sample.width or side), config.num_images
    ref = open_reference(reference, size, data)
    check_request(config, ref, reference, folder)
    extractor = main_first(
        lambda: load_extractor(config.weights, config.resize, config.dtype, device)
    )
    if ref.statistics:
        check_identity(ref.statistics, extractor, reference)

    settings: dict[str, Any] = {
        "target": str(target) if isinstance(target, str | Path) else type(target).__name__,
        "reference": reference,
        "eval": asdict(config),
        "data": asdict(ref.data) if ref.data else None,
        "extractor": {
            **extractor.identity,
            "weights_source": extractor.weights_source,
            "device": device.type,
            "chunk": FEATURE_CHUNK,
        },
    }
    real_rows = np.empty(0, np.int64)
    if ref.images:
        real_rows = draw(len(ref.images), n, config.seed)
        _warn_if_unequal(ref.images, size, len(real_rows), n)
    if isinstance(subject, ImageSet):
        pipe, images, generated_rows = None, subject, draw(len(subject), n, config.seed)
    else:
        pipe, generated_rows = subject, np.arange(n)
        settings |= {"sample": asdict(sample), **scheduler_settings(pipe, sample)}
        keep = folder / SAMPLES_FOLDER if folder and config.keep_images else None
        labels, asked = labels_for_samples(pipe, n, ref.images, real_rows)
        names = ref.images.label_names if ref.images else {}
        images = generated_images(pipe, labels, sample, keep, config.overwrite, asked, names)
    features = collect(images, generated_rows, ref, real_rows, extractor, config, pipe)

    def finish() -> dict[str, Any]:
        result, copies = _measure_all(features, extractor, config, settings)
        if folder:
            _write(folder, result, features, copies, extractor, config)
        return result

    result = on_main(finish)
    if is_main() and not config.quiet:
        print(format_result(result))
    return result


def evaluate_images(
    generated: ImageSet | NDArray[np.uint8],
    reference: ImageSet | NDArray[np.uint8] | KeptStatistics,
    config: EvalConfig | None = None,
    extractor: FeatureExtractor | None = None,
) -> "Measurement":
    """Compute the distances of given images, without files and floors.

    Args:
        generated: uint8 (n, H, W, 3), or an `ImageSet`.
        reference: The same, or statistics.
        config: What is measured; ``num_images`` is ignored, as all images are used.
        extractor: The feature network; loaded as configured by default.

    Returns:
        `Measurement`.

    Raises:
        UserError: As `evaluate`.
    """
    config = config or EvalConfig()
    extractor = extractor or load_extractor(
        config.weights, config.resize, config.dtype, pick_device(config.device)
    )

    def features(images: ImageSet | NDArray[np.uint8]) -> Features:
        images = images if isinstance(images, ImageSet) else array_images(images)
        return set_features(images, np.arange(len(images)), extractor, cache=False)

    if isinstance(reference, KeptStatistics):
        check_identity(reference, extractor, "the reference")
        return measure_against(features(generated), reference, extractor, config, "the reference")
    return measure(features(generated), features(reference), extractor, config)


def check_request(config: EvalConfig, ref: Reference, reference: str, folder: Path | None) -> None:
    """Raise a `UserError`, before any work, for what the reference or the output cannot give."""
    if config.floors and ref.images is None:
        raise UserError(f"floors need images, and {reference} holds statistics; set floors false")
    if config.memorisation and ref.train is None:
        raise UserError(
            f"memorisation needs training images, and {reference} has none; give a data source "
            "(art, imagefolder:PATH, hub:NAME) as --reference, or set memorisation false"
        )
    if config.save_statistics and (folder is None or ref.images is None):
        raise UserError("save_statistics needs an output folder and a reference of images")


def _warn_if_unequal(real: ImageSet, size: tuple[int, int], available: int, n: int) -> None:
    if real.size != tuple(size):
        logger.warning(
            "the images are %dx%d and the reference %dx%d: both are resized for the network, which "
            "affects the distance",
            *(size[1], size[0], real.size[1], real.size[0]),
        )
    if available < n:
        logger.warning("the reference has %d images, fewer than n = %d", available, n)


def check_identity(kept: KeptStatistics, extractor: FeatureExtractor, source: str) -> None:
    """Raise a `UserError` for statistics made with another extractor."""
    if kept.identity:
        own = extractor.identity
        differ = [
            f"{k} {kept.identity[k]}, not {own[k]}" for k in own if kept.identity[k] != own[k]
        ]
        if differ:
            raise UserError(
                f"{source} was made with another extractor: {'; '.join(differ)}. Evaluate with "
                "the same one, or make the statistics again (--save_statistics true)"
            )
    elif not extractor.is_inception:
        raise UserError(
            f"{source} cannot be compared with features of {extractor.name}: it does not name its "
            "extractor, and such files are made with Inception"
        )
    elif kept.statistics.mu.size != extractor.feature_dim:
        raise UserError(
            f"{source} holds {kept.statistics.mu.size} features and {extractor.name} gives "
            f"{extractor.feature_dim}; it was made with another extractor"
        )
    else:
        logger.warning(
            "%s does not name its network and resize; they are assumed to be Inception's pool3 "
            "with resize %s",
            *(source, extractor.resize),
        )


# Features of every set of an evaluation


@dataclass
class EvaluationFeatures:
    """Image sets of an evaluation and their features, the same on every process.

    Attributes:
        images: The images that are measured.
        generated_rows: Numbers of those used, (n,).
        generated: Their features, (n, D).
        reference: The reference.
        real_rows: Numbers of the reference images used, (m,).
        real: Their features, (m, D); None for statistics.
        train_images: The training split, if it is needed.
        train_rows: Numbers of the training images of the floor, (m,).
        train: Their features, (m, D).
        search_rows: Numbers of the training images searched for copies, (k,).
        search: Their features, (k, D).
        shrunk: Features of the shrunk reference images, (m, D).
        reconstructed: Features of the reference images after the VAE, (m, D).
        vae: Name of the VAE and its hash.
    """

    images: ImageSet
    generated_rows: Rows
    generated: Features
    reference: Reference
    real_rows: Rows
    real: Features | None = None
    train_images: ImageSet | None = None
    train_rows: Rows = field(default_factory=lambda: np.empty(0, np.int64))
    train: Features | None = None
    search_rows: Rows = field(default_factory=lambda: np.empty(0, np.int64))
    search: Features | None = None
    shrunk: Features | None = None
    reconstructed: Features | None = None
    vae: str = ""


def collect(
    images: ImageSet,
    generated_rows: Rows,
    ref: Reference,
    real_rows: Rows,
    extractor: FeatureExtractor,
    config: EvalConfig,
    pipe: ComplexityDiTPipeline | None,
) -> EvaluationFeatures:
    """Compute the features of every set that the configuration needs, on all processes."""

    def features(images: ImageSet, rows: Rows, *transform: Any) -> Features:
        return set_features(images, rows, extractor, config.cache, *transform)

    # Features of samples and of given folders are not cached, as these change between runs.
    cache = config.cache and images.lasting
    generated = set_features(images, generated_rows, extractor, cache)
    found = EvaluationFeatures(images, generated_rows, generated, ref, real_rows)
    if ref.images is None:
        return found
    found.real = features(ref.images, real_rows)
    has_labels = pipe is not None and config.label_field in images.label_names
    if ref.train and (config.floors or config.memorisation or has_labels):
        train = found.train_images = ref.train()
        if config.memorisation:
            most = config.memorisation_images or len(train)
            found.search_rows = draw(len(train), most, config.seed)
            found.search = features(train, found.search_rows)
        if config.floors or has_labels:
            rows = found.train_rows = draw(len(train), len(real_rows), config.seed)
            # Both draws are prefixes of one permutation.
            if found.search is not None and len(found.search) >= len(rows):
                found.train = found.search[: len(rows)]
            else:
                found.train = features(train, rows)
    if config.floors:
        found.shrunk = features(ref.images, real_rows, shrink, f"shrunk: {SHRUNK_FILTER}")
        if pipe is not None and pipe.vae is not None:
            transform, found.vae = vae_reconstruction(pipe)
            found.reconstructed = features(ref.images, real_rows, transform, found.vae)
    return found


# Measures of two sets of features


@dataclass
class Measurement:
    """Result of the measures.

    Attributes:
        metrics: Name -> number.
        absent: Name -> reason for which it is missing.
        settings: Settings of the measures besides the configuration.
        curve: Frechet distance over n as JSON, or empty.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    curve: dict[str, Any] = field(default_factory=dict)


def measure(
    generated: Features, real: Features, extractor: FeatureExtractor, config: EvalConfig
) -> Measurement:
    """Compute all configured measures of two sets of features.

    Args:
        generated: (n, D) from the extractor.
        real: (m, D).
        extractor: The extractor of both; it determines the names of the distances.
        config: Measures and their settings.

    Returns:
        A `Measurement`.

    Raises:
        UserError: Fewer than 2 images on a side, or features that are not finite.
    """
    found = Measurement()
    fd, kd = extractor.prefixes
    x, y = generated, real
    if "fid" in config.measures:
        found.metrics[fd] = fid_from_features(x, y)
        _error_and_curve(found, fd, x, y, config)
    if "kid" in config.measures:
        kid = _kid(x, y, config)
        found.metrics |= {f"{kd}_mean": kid.mean, f"{kd}_std": kid.std, f"{kd}_stderr": kid.stderr}
        found.settings["kid"] = {"subsets": kid.subsets, "subset_size": kid.subset_size}
    if "prdc" in config.measures:
        try:
            found.metrics |= manifold_overlap(x, y)._asdict()
            found.settings["neighbours"] = {
                "precision_recall": PRECISION_NEIGHBOURS,
                "density_coverage": DENSITY_NEIGHBOURS,
            }
        except UserError as error:
            found.absent["precision, recall, density, coverage"] = str(error)
    _inception_score(found, x, extractor, config)
    return found


def measure_against(
    generated: Features,
    kept: KeptStatistics,
    extractor: FeatureExtractor,
    config: EvalConfig,
    source: str,
) -> Measurement:
    """Compute the measures that stored statistics allow.

    Args:
        generated: (n, D) from the extractor.
        kept: The statistics.
        extractor: The extractor of the features.
        config: Which measures.
        source: Name of the statistics in errors.

    Raises:
        UserError: The statistics were made with another extractor, resize or dtype (all named), or
            do not name their extractor and have another width.
    """
    check_identity(kept, extractor, source)
    found = Measurement()
    fd, kd = extractor.prefixes
    if "fid" in config.measures:
        found.metrics[fd] = fid_to_statistics(generated, kept.statistics)
    only = "the reference is statistics; this needs the images"
    found.absent[f"{fd}_stderr, {fd}_infinity"] = only
    if "kid" in config.measures:
        found.absent[kd] = only
    if "prdc" in config.measures:
        found.absent["precision, recall, density, coverage"] = only
    _inception_score(found, generated, extractor, config)
    return found


def _kid(x: Features, y: Features, config: EvalConfig) -> KernelEstimate:
    return kid_from_features(x, y, config.kid_subsets, config.kid_subset_size, config.seed)


def _error_and_curve(
    found: Measurement, fd: str, x: Features, y: Features, config: EvalConfig
) -> None:
    """Standard error of the distance, and its extrapolation to infinite n."""
    if not config.bootstrap:
        found.absent[f"{fd}_stderr"] = "bootstrap is 0"
        if config.curve:
            found.absent[f"{fd}_infinity"] = "its interval needs the bootstrap, which is 0"
        return
    error = bootstrap(x, y, config.bootstrap, config.seed)
    found.metrics[f"{fd}_stderr"] = error.stderr
    if not config.curve:
        return
    try:
        curve = fid_curve(x, y, error.stderr, seed=config.seed)
    except UserError as reason:
        found.absent[f"{fd}_infinity"] = str(reason)
        return
    found.curve = curve._asdict()
    found.metrics |= {
        f"{fd}_infinity": curve.infinity,
        f"{fd}_infinity_low": curve.low,
        f"{fd}_infinity_high": curve.high,
    }


def _inception_score(
    found: Measurement, x: Features, extractor: FeatureExtractor, config: EvalConfig
) -> None:
    if "is" not in config.measures:
        return
    if extractor.classifier is None:
        found.absent["inception_score"] = (
            "the weights carry no classifier (fc): give pytorch-fid's or torch-fidelity's file"
            if extractor.is_inception
            else "it is defined on Inception's classifier; this is another network"
        )
        return
    try:
        mean, std = inception_score(x @ extractor.classifier.cpu().numpy().T)
        found.metrics |= {"inception_score_mean": mean, "inception_score_std": std}
    except UserError as error:
        found.absent["inception_score"] = str(error)


# The result and its files


def _measure_all(
    features: EvaluationFeatures,
    extractor: FeatureExtractor,
    config: EvalConfig,
    settings: dict[str, Any],
) -> tuple[dict[str, Any], Memorisation | None]:
    """The result as JSON, and the nearest training images if they were searched."""
    per_label: dict[str, Any] = {}
    nearest_images: dict[str, Any] = {}
    copies = None
    ref = features.reference
    if features.real is None or ref.images is None:
        assert ref.statistics is not None
        kept = ref.statistics
        source = settings["reference"]
        found = measure_against(features.generated, kept, extractor, config, source)
        n_reference = kept.statistics.n or None
        fingerprint = kept.fingerprint or array_hash(*kept.statistics[:2])
    else:
        found = measure(features.generated, features.real, extractor, config)
        n_reference, fingerprint = len(features.real), ref.images.fingerprint
        x, y = features.generated, features.real
        if features.train is not None:
            settings["n_train"] = len(features.train)
        per_label = _per_label(features, ref.images, x, y, found, extractor, config)
        if config.floors:
            _add_floors(features, y, found, extractor, config, settings)
        if features.search is not None:
            copies = memorisation(x, y, features.search)
            nearest_images = copies.summary()
            for pair in nearest_images["closest_pairs"]:
                # From rows of features to numbers of images.
                pair["sample"] = int(features.generated_rows[pair["sample"]])
                pair["training_image"] = int(features.search_rows[pair["training_image"]])
            found.metrics["closer_than_1_percent"] = copies.closer_than_1_percent
            settings["n_searched"] = len(features.search)
    result = {
        "metrics": found.metrics,
        "absent": found.absent,
        "fid_over_n": found.curve,
        "per_label": per_label,
        "memorisation": nearest_images,
        "n_generated": len(features.generated),
        "n_reference": n_reference,
        "settings": settings | found.settings,
        "versions": _versions(),
        "weights_sha256": extractor.weights_sha256,
        "reference_fingerprint": fingerprint,
        "target_fingerprint": features.images.fingerprint,
    }
    return json.loads(json.dumps(result, allow_nan=False)), copies


def _per_label(
    features: EvaluationFeatures,
    real: ImageSet,
    x: Features,
    y: Features,
    found: Measurement,
    extractor: FeatureExtractor,
    config: EvalConfig,
) -> dict[str, Any]:
    """Accuracy of the requested labels (into `found`), and distances and floor of each label."""
    name = config.label_field
    if name is None or name not in real.label_names:
        return {}
    names, real_ids = real.label_names[name], real.column(name)[features.real_rows]
    asked = labels_in_reference_ids(features.images, name, names)
    if asked is None:
        return {}
    asked = asked[features.generated_rows]
    table = distances_by_label(x, asked, y, real_ids, names, config, extractor.prefixes)
    for label, row in table.items():
        if "skipped" in row:
            logger.info("%s %s: %s", name, label, row["skipped"])
    if features.train_images is not None and features.train is not None:
        train = features.train
        train_ids = features.train_images.column(name)[features.train_rows]
        means = class_means(train, train_ids)
        found.metrics["label_accuracy"] = nearest_class_mean_accuracy(x, asked, means)
        found.metrics["label_accuracy_real"] = nearest_class_mean_accuracy(y, real_ids, means)
        if config.floors:
            floor = distances_by_label(
                *(train, train_ids, y, real_ids, names, config, extractor.prefixes)
            )
            for label, row in floor.items():
                table[label]["floor"] = row
    return {"field": name, "labels": table}


def _add_floors(
    features: EvaluationFeatures,
    y: Features,
    found: Measurement,
    extractor: FeatureExtractor,
    config: EvalConfig,
    settings: dict[str, Any],
) -> None:
    """Distances of training, reconstructed and shrunk images from the reference images."""
    fd, kd = extractor.prefixes
    settings["shrunk"] = SHRUNK_FILTER
    sets = {
        "train": (features.train, "the reference has no training split"),
        "vae": (features.reconstructed, "there is no VAE"),
        "shrunk": (features.shrunk, ""),
    }
    for name, (others, reason) in sets.items():
        if others is None:
            found.absent[f"{fd}_{name}"] = reason
            continue
        found.metrics[f"{fd}_{name}"] = distance_of_sets(others, y)
        if name != "shrunk":
            found.metrics[f"{kd}_{name}"] = _kid(others, y, config).mean
    if features.vae:
        settings["vae"] = features.vae


def _write(
    folder: Path,
    result: dict[str, Any],
    features: EvaluationFeatures,
    copies: Memorisation | None,
    extractor: FeatureExtractor,
    config: EvalConfig,
) -> None:
    """Write the files of a result; result.json is last and marks the others as complete."""
    real, images = features.real, features.reference.images
    if config.save_statistics and real is not None and images is not None:
        kept = KeptStatistics(feature_statistics(real), extractor.identity, images.fingerprint)
        write_statistics(folder / "reference.npz", kept)
    if config.report:
        pictures = Pictures.of(
            *(features.images, features.generated_rows, images, features.real_rows),
            *(features.train_images, result["memorisation"].get("closest_pairs", [])),
        )
        write_report(folder / "report.html", result, pictures, copies)
    with atomic_file(folder / "result.json") as scratch:
        scratch.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")


def _versions() -> dict[str, str]:
    names = ("complexity-dit", "inl-core", "torch", "diffusers", "transformers", "numpy", "pillow")
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
