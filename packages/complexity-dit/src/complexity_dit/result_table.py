"""The table that ends an evaluation on the terminal."""

from typing import Any


def format_result(result: dict[str, Any]) -> str:
    """The table that ends an evaluation on the terminal."""
    extractor, n = result["settings"]["extractor"], result["n_reference"]
    lines = [
        f"n = {result['n_generated']} generated, {'an unknown number of' if n is None else n} "
        "reference images",
        f"features: {extractor['name']} ({extractor['weights_source']}), "
        f"resize {extractor['resize']}, {extractor['dtype']}",
    ]
    if "fd_random" in result["metrics"]:
        lines.append("fd_random comes from a random network: it is NOT FID and compares with none")
    elif extractor["name"].partition("-")[0] not in ("inception", "random"):
        lines.append("the distance is named after its network: it is NOT FID")
    width = max(map(len, result["metrics"]), default=0)
    lines += [f"  {name:<{width}}  {value:.6g}" for name, value in result["metrics"].items()]
    lines += [f"  {name}: absent, {why}" for name, why in result["absent"].items()]
    if labels := result["per_label"].get("labels"):
        width = max(map(len, labels))
        lines.append(f"by {result['per_label']['field']}:")
        lines += [f"  {name:<{width}}  {_label_line(row)}" for name, row in labels.items()]
    return "\n".join(lines)


def _label_line(row: dict[str, Any]) -> str:
    if "skipped" in row:
        return row["skipped"]
    numbers = [f"{k} {v:.5g}" for k, v in row.items() if k.startswith(("fid", "fd", "kid_m", "kd"))]
    return f"n {row['n']}  " + "  ".join(n for n in numbers if "_std" not in n)
