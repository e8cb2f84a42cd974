"""A study: a YAML file of named networks with the changes of each to one run."""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import yaml
from benchmarks.common.fields import with_fields

BASELINE = "none"
SECTIONS = ("package", "run", "plain", "longer", "variants")


@dataclass(frozen=True)
class Network:
    """A network of a study.

    Attributes:
        name: Name in rows and tables.
        fields: Dotted fields of the config, with their values.
        swap: Name of a swap of `variants` that is applied to the network, or None.
        longer: Steps of the run over those of the study.
        plain: Whether it is a network without dynamics, for comparison.
    """

    name: str
    fields: dict
    swap: str | None = None
    longer: float = 1.0
    plain: bool = False


@dataclass(frozen=True)
class Study:
    """The content of the file.

    Attributes:
        name: Name of the file without suffix.
        package: lm or dit.
        run: Fields of the config of all networks.
        networks: {name: network}: the plain ones, the baseline first, then the variants.
    """

    name: str
    package: str
    run: dict
    networks: dict

    def config(self, lab, network, seed, out, overrides):
        """The config of a cell; `overrides` apply to all cells of a call and take precedence."""
        shared = flat(self.run) | network.fields | overrides
        shared["steps"] = round(shared["steps"] * network.longer)
        own = {"out": str(out), "seed": seed, "resume": "auto", "dynamics_every": shared["steps"]}
        return with_fields(lab.blank(), {k: expanded(v) for k, v in (shared | own).items()})


def read_study(path):
    """Read a study from a file.

    Raises:
        ValueError: If a section is missing or unknown, or a name occurs twice.
    """
    path = Path(path)
    content = yaml.safe_load(path.read_text())
    if set(content) != set(SECTIONS):
        raise ValueError(f"{path} has the sections {sorted(content)}, expected {list(SECTIONS)}")
    if content["package"] not in ("lm", "dit"):
        raise ValueError(f"{path}: package {content['package']!r} must be lm or dit")
    networks = [Network(name, flat(f), plain=True) for name, f in content["plain"].items()]
    if not networks or networks[0].name != BASELINE:
        raise ValueError(f"{path}: the first plain network must be called {BASELINE}")
    networks += [
        Network(f"{BASELINE}, {factor:g} x steps", networks[0].fields, longer=factor, plain=True)
        for factor in content["longer"]
    ]
    for name, fields in content["variants"].items():
        fields = dict(fields)
        swap = fields.pop("swap", None)
        networks.append(Network(name, flat(fields), swap))
    by_name = {network.name: network for network in networks}
    if len(by_name) < len(networks):
        raise ValueError(f"{path}: a name occurs twice")
    return Study(path.stem, content["package"], content["run"], by_name)


def flat(fields, prefix=""):
    """Flatten nested dictionaries to dotted fields."""
    found = {}
    for key, value in fields.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def expanded(value):
    """Expand environment variables in text; other values stay.

    Raises:
        ValueError: If a variable is not set.
    """
    if not isinstance(value, str):
        return value
    value = os.path.expandvars(value)
    if unset := re.search(r"\$\{?\w+\}?", value):
        raise ValueError(f"{value}: set the environment variable {unset[0]}, or use --override")
    return value


def shape_of(config, network):
    """Identifies a cell in the result file, together with its name: data, seed and a config hash.

    The hash leaves out folders of the machine and fields without effect on the numbers. Fields that
    are younger than the committed rows enter it only with a value that changes the numbers, renamed
    ones by their first name, and removed ones with the value that all rows had, so that the rows
    stay those of the same settings.
    """
    if is_dit := hasattr(config, "objective"):
        config = replace(
            config, model=config.model.resolved(), objective=config.objective.resolved()
        )
    settings = asdict(config) | {"swap": network.swap}
    if is_dit:
        settings["data"]["balanced_labels"] = None
        settings["model"] |= {"value_residual": False, "routing": "none", "num_experts": 4}
        settings["objective"] |= {"direction_weight": 0.0, "direction_over": "image"}
        if config.text_encoder == type(config.text_encoder)():
            del settings["text_encoder"]
    if config.__class__.__module__.startswith("complexity_lm"):
        settings["tracker"] = settings.pop("report_to")
        young = {"keep_best": False, "peak_tflops": None, "init_from": None, "push_to_hub": None}
        settings = {k: v for k, v in settings.items() if k not in young or v != young[k]}
        if not settings["lora"]["rank"]:
            del settings["lora"]
    for group, name, usual in (
        (settings["data"], "crop", "center"),
        (settings["model"], "auxiliary_layer", 0),
        (settings.get("objective", {}), "auxiliary_weight", 0.5),
        (settings.get("ema", {}), "snapshot_every", 0),
        (settings.get("ema", {}), "lengths", [0.05, 0.1]),
        (settings, "heldout_every", 0),
        (settings, "heldout_num_images", 256),
        (settings, "evaluate_dtype", "auto"),
        (settings.get("objective", {}), "label_dropout_all", 0.0),
        (settings["data"], "clusters", 0),
        (settings["data"], "separate_documents", False),
        (settings["data"], "document_separator", None),
        (settings["model"], "num_loops", 1),
        (settings["model"], "preset", None),
        (settings, "loop_sampling", "fixed"),
        (settings["data"], "format", "text"),
        (settings["data"], "messages_column", "messages"),
        (settings["data"], "text_column", None),
        (settings["data"], "caption_template", None),
    ):
        if name in group and group[name] == usual:
            del group[name]
    for key in ("out", "resume", "seed", "checkpoint_every", "keep_last", "log_every"):
        del settings[key]
    source = settings["data"].pop("source")
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    scheme, _, place = source.partition(":")
    return f"{Path(place).stem or scheme}, seed {config.seed}, config {digest}"
