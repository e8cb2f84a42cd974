"""Two results side by side, when they were measured alike."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inl_core.run.errors import UserError
from inl_core.run.json_files import fits, read_json_object

# What a number does not depend on: names, speed, output, and extras beside it.
_FREE = (
    "target",
    "reference",
    "vae",
    "eval.weights",
    "eval.label_field",
    "eval.label_min",
    "eval.floors",
    "eval.memorisation",
    "eval.memorisation_images",
    "eval.keep_images",
    "eval.report",
    "eval.save_statistics",
    "eval.cache",
    "eval.overwrite",
    "eval.quiet",
    "eval.num_images",  # what was reached counts: n_generated and n_reference
    "eval.measures",
    "eval.curve",
    "eval.device",
    "n_train",
    "shrunk",
    "extractor.weights_source",
    "data",  # reference_fingerprint says whether it is the same data
    "sample.batch_size",
)
_TOP = ("n_generated", "n_reference", "weights_sha256", "reference_fingerprint")


def compare(first: str | Path, second: str | Path, allow: Sequence[str] = ()) -> str:
    """A table of two results.

    Args:
        first: A ``result.json``.
        second: Another.
        allow: Fields that may differ, such as ``sample.guidance_scale``; a prefix (``sample``)
            allows all below it. They are shown above the table.

    Returns:
        The table as text.

    Raises:
        UserError: A file is no result, or settings differ that are not allowed to; it names them.
    """
    a, b = read_result(first), read_result(second)
    differing = different_settings(a, b)
    allowed = {name: pair for name, pair in differing.items() if _covered(name, allow)}
    refused = {name: pair for name, pair in differing.items() if name not in allowed}
    if refused:
        lines = [f"{name}: {_shown(x)} and {_shown(y)}" for name, (x, y) in refused.items()]
        raise UserError(
            f"{first} and {second} were measured under different settings:\n  "
            + "\n  ".join(lines)
            + "\nMeasure both alike, or name what may differ with --allow"
        )
    lines = [
        f"A = {first} ({a['settings'].get('target')})",
        f"B = {second} ({b['settings'].get('target')})",
    ]
    lines += [
        f"different by --allow: {name}: {_shown(x)} and {_shown(y)}"
        for name, (x, y) in allowed.items()
    ]
    rows = [("", "A", "B", "B - A")]
    for name in dict.fromkeys([*a["metrics"], *b["metrics"]]):
        x, y = a["metrics"].get(name), b["metrics"].get(name)
        gap = f"{y - x:+.4g}" if x is not None and y is not None else ""
        rows.append((name, _number(x), _number(y), gap))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def different_settings(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that numbers depend on and that differ: name -> both values, in order."""
    flat_a, flat_b = (
        {name: result.get(name) for name in _TOP} | _flat(result["settings"]) for result in (a, b)
    )
    names = [n for n in dict.fromkeys([*flat_a, *flat_b]) if not _covered(n, _FREE)]
    return {n: (flat_a.get(n), flat_b.get(n)) for n in names if flat_a.get(n) != flat_b.get(n)}


def read_result(path: str | Path) -> dict[str, Any]:
    """A result.json, or the one in a folder.

    Raises:
        UserError: No such file, or it is no result.
    """
    file = Path(path) / "result.json" if Path(path).is_dir() else Path(path)
    try:
        result = read_json_object(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as a result ({error})") from error
    metrics, settings = result.get("metrics"), result.get("settings")
    if not fits(metrics, dict[str, float | None]) or not fits(settings, dict[str, Any]):
        raise UserError(
            f"{file} is no result.json of complexity-dit evaluate: it has numbers under `metrics` "
            "and what they were measured with under `settings`"
        )
    return result


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _covered(name: str, names: Sequence[str]) -> bool:
    return any(name == known or name.startswith(known + ".") for known in names)


def _shown(value: Any) -> str:
    return "nothing" if value is None else str(value)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
