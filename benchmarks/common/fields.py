"""Configs with dotted fields replaced, as studies and `--override` give them."""

import json
from dataclasses import fields, is_dataclass, replace


def with_fields(config, overrides):
    """The config with dotted fields replaced, e.g. `{"optim.lr": 1e-3}`.

    Fields that are dictionaries get the key.

    Raises:
        ValueError: If the config does not have a field.
    """
    for path, value in overrides.items():
        name, _, rest = path.partition(".")
        if isinstance(config, dict):
            config = config | {
                name: with_fields(config.get(name, {}), {rest: value}) if rest else value
            }
            continue
        if not is_dataclass(config) or name not in {field.name for field in fields(config)}:
            raise ValueError(f"{type(config).__name__} has no field {name!r} (of {path})")
        inner = with_fields(getattr(config, name), {rest: value}) if rest else value
        config = replace(config, **{name: inner})
    return config


def overridden(items):
    """{field: value} of the items FIELD=VALUE of `--override`; values are JSON or else text."""

    def value_of(text):
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text

    return {field: value_of(text) for field, _, text in (item.partition("=") for item in items)}


def override_flag(items):
    """The items of `--override` as the end of a recorded command; empty without items."""
    return " ".join(["", "--override", *items]) if items else ""
