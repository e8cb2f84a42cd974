"""The evaluation: images -> features -> distances, floors, copies -> result.json and a report.

One implementation for the command, the library and the training loop. The target is a pipeline
(its samples are made on the fly, asked for the label rows of the reference images), or images of a
folder, an ``.npz`` or a source's training split; the reference is a data source (its held-out
split), images, or kept statistics. Started on several processes, each takes its share of images.
"""

import importlib.metadata
import json
import logging
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from complexity_dit.config import DataConfig, EvalConfig
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
from complexity_dit.evaluation.features import FEATURE_CHUNK, draw, extract_features, set_features
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
from complexity_dit.evaluation.report import format_result
from complexity_dit.evaluation.samples import generated_images
from complexity_dit.hashing import array_hash
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.pipelines.sampling import scheduler_settings
from inl_core.run.errors import UserError
from inl_core.run.files import atomic_file

if TYPE_CHECKING:
    from complexity_dit.config import SampleConfig

__all__ = ["EvalConfig", "evaluate", "evaluate_images", "extract_features", "format_result"]


# From the features of two sides to the numbers of a result, and the reasons for absent ones.

logger = logging.getLogger(__name__)

Features = NDArray[np.float32]


@dataclass
class Measurement:
    """What was measured.

    Attributes:
        metrics: Name -> number.
        absent: Name -> why it is not there.
        settings: What the numbers depend on besides the configuration.
        curve: The Frechet distance over n, as JSON; empty without.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    curve: dict[str, Any] = field(default_factory=dict)


def measure(
    generated: Features, real: Features, extractor: FeatureExtractor, config: EvalConfig
) -> Measurement:
    """All measures of two sets of features.

    Args:
        generated: (n, D) as the extractor gives them, spatial features included.
        real: (m, D).
        extractor: What gave them; names the distances.
        config: Which measures, and their settings.

    Returns:
        A `Measurement`.

    Raises:
        UserError: Fewer than 2 images on a side, or features that are not finite.
    """
    found = Measurement()
    fd, kd = extractor.prefixes
    x, y = pooled(generated, extractor), pooled(real, extractor)
    if "fid" in config.measures:
        found.metrics[fd] = fid_from_features(x, y)
        _spread_and_curve(found, fd, x, y, config)
    if "kid" in config.measures:
        kid = kid_of(x, y, config)
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
    if "sfid" in config.measures:
        if extractor.spatial_dim:
            found.metrics["sfid"] = distance_of_sets(
                spatial(generated, extractor), spatial(real, extractor)
            )
        else:
            found.absent["sfid"] = _NO_SPATIAL
    _inception_score(found, x, extractor, config)
    return found


def measure_against(
    generated: Features,
    kept: KeptStatistics,
    extractor: FeatureExtractor,
    config: EvalConfig,
    source: str,
) -> Measurement:
    """What can be measured against kept statistics.

    Args:
        generated: (n, D) as the extractor gives them.
        kept: The statistics.
        extractor: What gave the features.
        config: Which measures.
        source: What the statistics are called in errors.

    Raises:
        UserError: The statistics were made with another extractor, resize or dtype (all named), or
            by a program that does not say and for another width.
    """
    check_identity(kept, extractor, source)
    found = Measurement()
    fd, kd = extractor.prefixes
    if "fid" in config.measures:
        found.metrics[fd] = fid_to_statistics(pooled(generated, extractor), kept.statistics)
    if "sfid" in config.measures:
        if extractor.spatial_dim and kept.spatial:
            found.metrics["sfid"] = fid_to_statistics(spatial(generated, extractor), kept.spatial)
        else:
            found.absent["sfid"] = (
                "the statistics hold no spatial features" if extractor.spatial_dim else _NO_SPATIAL
            )
    only = "the reference is statistics; this needs the images"
    found.absent[f"{fd}_stderr, {fd}_infinity"] = only
    if "kid" in config.measures:
        found.absent[kd] = only
    if "prdc" in config.measures:
        found.absent["precision, recall, density, coverage"] = only
    _inception_score(found, pooled(generated, extractor), extractor, config)
    return found


def check_identity(kept: KeptStatistics, extractor: FeatureExtractor, source: str) -> None:
    """Refuse statistics that this extractor did not make."""
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
            f"{source} cannot be compared with features of {extractor.name}: it does not say what "
            "it was made with, and such files hold Inception's"
        )
    elif kept.statistics.mu.size != extractor.feature_dim:
        raise UserError(
            f"{source} holds {kept.statistics.mu.size} features and {extractor.name} gives "
            f"{extractor.feature_dim}; it was made with another extractor"
        )
    else:
        logger.warning(
            "%s does not say which network and resize it was made with; it is taken to be "
            "Inception's pool3 with resize %s",
            source,
            extractor.resize,
        )


def pooled(features: Features, extractor: FeatureExtractor) -> Features:
    """The columns that distances are measured in."""
    return features[:, : extractor.feature_dim]


def spatial(features: Features, extractor: FeatureExtractor) -> Features:
    """The columns of sFID."""
    return features[:, extractor.feature_dim :]


def kid_of(x: Features, y: Features, config: EvalConfig) -> KernelEstimate:
    """KID with the subsets of a configuration."""
    return kid_from_features(x, y, config.kid_subsets, config.kid_subset_size, config.seed)


_NO_SPATIAL = "sFID is defined on a layer of Inception; this is another network"


def _spread_and_curve(
    found: Measurement, fd: str, x: Features, y: Features, config: EvalConfig
) -> None:
    """The standard error of the distance, and its continuation to infinite n."""
    if not config.bootstrap:
        found.absent[f"{fd}_stderr"] = "bootstrap is 0"
        if config.curve:
            found.absent[f"{fd}_infinity"] = "its interval needs the bootstrap, which is 0"
        return
    spread = bootstrap(x, y, config.bootstrap, config.seed)
    found.metrics[f"{fd}_stderr"] = spread.stderr
    if not config.curve:
        return
    try:
        curve = fid_curve(x, y, spread.stderr, seed=config.seed)
    except UserError as error:
        found.absent[f"{fd}_infinity"] = str(error)
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


# The features of all sets an evaluation needs: both sides, and what floors and searches take.


@dataclass
class EvaluationFeatures:
    """All features an evaluation needs, with the sets they are of; the same on every process."""

    generated: ImageSet
    picked: NDArray[np.int64]
    fake: Features
    ref: Reference
    rows: NDArray[np.int64]
    true: Features | None = None
    train: ImageSet | None = None
    train_rows: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    seen: Features | None = None
    searched: Features | None = None
    searched_rows: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    shrunk: Features | None = None
    reconstructed: Features | None = None
    vae: str = ""


def check_request(config: EvalConfig, ref: Reference, reference: str, folder: Path | None) -> None:
    """Say before any work what cannot be had."""
    if config.floors and ref.images is None:
        raise UserError(f"floors need images, and {reference} holds statistics; set floors false")
    if config.memorisation and ref.train is None:
        raise UserError(
            f"memorisation needs training images, and {reference} has none; give a data source "
            "(art, imagefolder:PATH, hub:NAME) as --reference, or set memorisation false"
        )
    if config.save_statistics and (folder is None or ref.images is None):
        raise UserError("save_statistics needs an output folder and a reference of images")


def collect(
    generated: ImageSet,
    picked: NDArray[np.int64],
    ref: Reference,
    rows: NDArray[np.int64],
    extractor: FeatureExtractor,
    config: EvalConfig,
    pipe: "ComplexityDiTPipeline | None",
) -> EvaluationFeatures:
    """Run the feature network over every set that is asked for; all processes take part."""

    def of(images: ImageSet, numbers: NDArray[np.int64], *transform: Any) -> Features:
        return set_features(images, numbers, extractor, config.cache, *transform)

    # Samples and given folders change from run to run: their features are not kept.
    kept = config.cache and generated.lasting
    fake = set_features(generated, picked, extractor, kept)
    sides = EvaluationFeatures(generated, picked, fake, ref, rows)
    if ref.images is None:
        return sides
    sides.true = of(ref.images, rows)
    named = pipe is not None and config.label_field in generated.label_names
    if ref.train and (config.floors or config.memorisation or named):
        sides.train = ref.train()
        count = len(sides.train)
        most = 0
        if config.memorisation:
            most = min(config.memorisation_images or count, count)
            sides.searched_rows = draw(count, most, config.seed)
            sides.searched = of(sides.train, sides.searched_rows)
        if config.floors or named:
            sides.train_rows = draw(count, len(rows), config.seed)
            if sides.searched is not None and most >= len(sides.train_rows):
                # Both draws begin alike: the search has these already.
                sides.seen = sides.searched[: len(sides.train_rows)]
            else:
                sides.seen = of(sides.train, sides.train_rows)
    if config.floors:
        sides.shrunk = of(ref.images, rows, shrink, f"shrunk: {SHRUNK_FILTER}")
        if pipe is not None and pipe.vae is not None:
            transform, sides.vae = vae_reconstruction(pipe)
            sides.reconstructed = of(ref.images, rows, transform, sides.vae)
    return sides


SAMPLES_FOLDER = "generated"


def evaluate(
    target: "str | Path | ComplexityDiTPipeline",
    reference: str | Path,
    out: str | Path | None = None,
    config: EvalConfig | None = None,
    sample: "SampleConfig | None" = None,
    data: "DataConfig | None" = None,
) -> dict[str, Any]:
    """Measure a pipeline or a set of images against real ones.

    Args:
        target: A pipeline, its folder or Hub id; a folder of images of one size; an ``.npz`` with
            ``arr_0``; or a data source, whose training split is measured.
        reference: ``art``, ``imagefolder:PATH`` or ``hub:NAME`` (its held-out split), a folder of
            images, an ``.npz`` of images (``arr_0``) or of statistics (``mu``, ``sigma``).
        out: Folder that gets ``result.json``, ``report.html`` and the samples; None writes nothing.
        config: What is measured.
        sample: How a pipeline paints (seed, steps, guidance, batch).
        data: How a source is read (hold-out fraction, label fields); by default as in the
            training of the pipeline, so that nothing it was trained on is held out. Its source
            and resolution are replaced by the reference's and the target's.

    Returns:
        The result, as written, on every process: ``metrics``, ``absent`` (what could not be
        measured, and why), ``fid_over_n``, ``per_label``, ``memorisation``, ``n_generated``,
        ``n_reference`` (None where statistics do not say), ``settings``, ``versions``,
        ``weights_sha256``, ``reference_fingerprint``, ``target_fingerprint``.

    Raises:
        UserError: Fewer than 2 images on a side, a result that exists, unreadable images or
            statistics, statistics of another extractor, floors without images to measure, a
            setting out of range, or a process that is gone.
    """
    config = config or EvalConfig()
    with report_dead_evaluation_workers():
        folder = Path(out) if out is not None else None
        return _evaluate(target, reference, folder, config, sample, data)


def _evaluate(
    target: "str | Path | ComplexityDiTPipeline",
    reference: str | Path,
    folder: Path | None,
    config: EvalConfig,
    sample: "SampleConfig | None",
    data: "DataConfig | None",
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
        size = (sample.height or side, sample.width or side) if sample else (side, side)
        n = config.num_images
    ref = open_reference(str(reference), size, data)
    check_request(config, ref, str(reference), folder)
    extractor = main_first(
        lambda: load_extractor(
            *(config.weights, config.resize, config.dtype, device),
            spatial="sfid" in config.measures,
        )
    )
    if ref.statistics:
        check_identity(ref.statistics, extractor, str(reference))

    settings: dict[str, Any] = {
        "target": str(target) if isinstance(target, str | Path) else type(target).__name__,
        "reference": str(reference),
        "eval": asdict(config),
        "data": asdict(ref.data) if ref.data else None,
        "extractor": {
            **extractor.identity,
            "weights_source": extractor.weights_source,
            "device": device.type,
            "chunk": FEATURE_CHUNK,
        },
    }
    rows = draw(len(ref.images), n, config.seed) if ref.images else np.empty(0, np.int64)
    if ref.images:
        _warn_of_unequal_sides(ref.images, size, len(rows), n)
    if isinstance(subject, ImageSet):
        pipe, generated, picked = None, subject, draw(len(subject), n, config.seed)
    else:
        from complexity_dit.config import SampleConfig

        pipe, sample, picked = subject, sample or SampleConfig(), np.arange(n)
        settings |= {"sample": asdict(sample), **scheduler_settings(pipe, sample)}
        keep = folder / SAMPLES_FOLDER if folder and config.keep_images else None
        labels, asked = labels_for_samples(pipe, n, ref.images, rows)
        names = ref.images.label_names if ref.images else {}
        generated = generated_images(pipe, labels, sample, keep, config.overwrite, asked, names)
    sides = collect(generated, picked, ref, rows, extractor, config, pipe)

    def finish() -> dict[str, Any]:
        result, found = _measure_all(sides, extractor, config, settings)
        if folder:
            _write(folder, result, sides, found, extractor, config)
        return result

    result = on_main(finish)
    if is_main() and not config.quiet:
        print(format_result(result))
    return result


def _warn_of_unequal_sides(real: ImageSet, size: tuple[int, int], found: int, n: int) -> None:
    if real.size != tuple(size):
        logger.warning(
            "the images are %dx%d and the reference %dx%d: both are resized for the network, and "
            "the distance holds what that does to them",
            *(size[1], size[0], real.size[1], real.size[0]),
        )
    if found < n:
        logger.warning("the reference has %d images, fewer than n = %d", found, n)


def evaluate_images(
    generated: "ImageSet | NDArray[np.uint8]",
    reference: "ImageSet | NDArray[np.uint8] | KeptStatistics",
    config: EvalConfig | None = None,
    extractor: FeatureExtractor | None = None,
) -> Measurement:
    """The distances alone, of images at hand: no files, no floors; `evaluate` is built of the same.

    Args:
        generated: uint8 (n, H, W, 3), or an `ImageSet`.
        reference: The same, or statistics.
        config: What is measured; ``num_images`` does not matter here, all images are taken.
        extractor: The feature network; loaded as the configuration says by default.

    Returns:
        `Measurement`: ``metrics`` and what is ``absent``.

    Raises:
        UserError: As `evaluate`.
    """
    config = config or EvalConfig()
    extractor = extractor or load_extractor(
        *(config.weights, config.resize, config.dtype, pick_device(config.device)),
        spatial="sfid" in config.measures,
    )

    def features(images: "ImageSet | NDArray[np.uint8]") -> Features:
        images = images if isinstance(images, ImageSet) else array_images(images)
        return set_features(images, np.arange(len(images)), extractor, cache=False)

    if isinstance(reference, KeptStatistics):
        check_identity(reference, extractor, "the reference")
        return measure_against(features(generated), reference, extractor, config, "the reference")
    return measure(features(generated), features(reference), extractor, config)


def _measure_all(
    sides: EvaluationFeatures,
    extractor: FeatureExtractor,
    config: EvalConfig,
    settings: dict[str, Any],
) -> tuple[dict[str, Any], Memorisation | None]:
    """The result as JSON, and the nearest training images where they were looked for."""
    per_label: dict[str, Any] = {}
    copies = None
    if sides.true is None or sides.ref.images is None:
        assert sides.ref.statistics is not None
        kept = sides.ref.statistics
        found = measure_against(sides.fake, kept, extractor, config, settings["reference"])
        n_reference = kept.statistics.n or None
        fingerprint = kept.fingerprint or array_hash(*kept.statistics[:2])
    else:
        found = measure(sides.fake, sides.true, extractor, config)
        n_reference, fingerprint = len(sides.true), sides.ref.images.fingerprint
        x, y = pooled(sides.fake, extractor), pooled(sides.true, extractor)
        if sides.seen is not None:
            settings["n_train"] = len(sides.seen)
        per_label = _labels(sides, x, y, found, extractor, config)
        if config.floors:
            _floors(sides, y, found, extractor, config, settings)
        if sides.searched is not None:
            copies = memorisation(x, y, pooled(sides.searched, extractor))
            found.metrics["closer_than_1_percent"] = copies.closer_than_1_percent
            settings["n_searched"] = len(sides.searched)
    result = {
        "metrics": found.metrics,
        "absent": found.absent,
        "fid_over_n": found.curve,
        "per_label": per_label,
        "memorisation": _described(copies, sides) if copies else {},
        "n_generated": len(sides.fake),
        "n_reference": n_reference,
        "settings": settings | found.settings,
        "versions": _versions(),
        "weights_sha256": extractor.weights_sha256,
        "reference_fingerprint": fingerprint,
        "target_fingerprint": sides.generated.fingerprint,
    }
    return json.loads(json.dumps(result, allow_nan=False)), copies


def _labels(
    sides: EvaluationFeatures,
    x: Features,
    y: Features,
    found: Measurement,
    extractor: FeatureExtractor,
    config: EvalConfig,
) -> dict[str, Any]:
    """The accuracy of the labels asked for, and each label's own distances and floor."""
    ref, name = sides.ref.images, config.label_field
    if ref is None or name is None or name not in ref.label_names:
        return {}
    names = ref.label_names[name]
    real_ids = ref.column(name)[sides.rows]
    asked = labels_in_reference_ids(sides.generated, name, names)
    if asked is None:
        return {}
    asked = asked[sides.picked]
    train_ids = None
    if sides.train is not None and sides.seen is not None:
        train_ids = sides.train.column(name)[sides.train_rows]
        means = class_means(pooled(sides.seen, extractor), train_ids)
        found.metrics["label_accuracy"] = nearest_class_mean_accuracy(x, asked, means)
        found.metrics["label_accuracy_real"] = nearest_class_mean_accuracy(y, real_ids, means)
    table = distances_by_label(x, asked, y, real_ids, names, config, extractor.prefixes)
    for label, row in table.items():
        if "skipped" in row:
            logger.info("%s %s: %s", name, label, row["skipped"])
    if config.floors and train_ids is not None and sides.seen is not None:
        seen = pooled(sides.seen, extractor)
        floor = distances_by_label(seen, train_ids, y, real_ids, names, config, extractor.prefixes)
        for label, row in floor.items():
            table[label]["floor"] = row
    return {"field": name, "labels": table}


def _floors(
    sides: EvaluationFeatures,
    y: Features,
    found: Measurement,
    extractor: FeatureExtractor,
    config: EvalConfig,
    settings: dict[str, Any],
) -> None:
    """Distances of training, reconstructed and shrunk images from the reference images."""
    fd, kd = extractor.prefixes
    settings["shrunk"] = SHRUNK_FILTER
    sets = {"train": sides.seen, "vae": sides.reconstructed, "shrunk": sides.shrunk}
    for name, features in sets.items():
        if features is None:
            why = {"train": "the reference has no training split", "vae": "there is no VAE"}[name]
            found.absent[f"{fd}_{name}"] = why
            continue
        z = pooled(features, extractor)
        found.metrics[f"{fd}_{name}"] = distance_of_sets(z, y)
        if name != "shrunk":
            found.metrics[f"{kd}_{name}"] = kid_of(z, y, config).mean
    if sides.vae:
        settings["vae"] = sides.vae


def _described(copies: Memorisation, sides: EvaluationFeatures) -> dict[str, Any]:
    """The summary with training images by their number in the split, not in the search."""
    summary = copies.summary()
    for pair in summary["closest_pairs"]:
        pair["sample"] = int(sides.picked[pair["sample"]])
        pair["training_image"] = int(sides.searched_rows[pair["training_image"]])
    return summary


def _write(
    folder: Path,
    result: dict[str, Any],
    sides: EvaluationFeatures,
    copies: Memorisation | None,
    extractor: FeatureExtractor,
    config: EvalConfig,
) -> None:
    """The files of a result; result.json comes last, and says that all of them are there."""
    if config.save_statistics and sides.true is not None and sides.ref.images is not None:
        own = feature_statistics(spatial(sides.true, extractor)) if extractor.spatial_dim else None
        kept = KeptStatistics(
            *(feature_statistics(pooled(sides.true, extractor)), own, extractor.identity),
            fingerprint=sides.ref.images.fingerprint,
        )
        write_statistics(folder / "reference.npz", kept)
    if config.report:
        from complexity_dit.evaluation.report import Pictures, write_report

        pictures = Pictures.of(
            *(sides.generated, sides.picked, sides.ref.images, sides.rows),
            *(sides.train, result["memorisation"].get("closest_pairs", [])),
        )
        write_report(folder / "report.html", result, pictures, copies)
    with atomic_file(folder / "result.json") as scratch:
        scratch.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")


def _versions() -> dict[str, str]:
    names = ("complexity-dit", "inl-core", "torch", "diffusers", "transformers", "numpy", "pillow")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
