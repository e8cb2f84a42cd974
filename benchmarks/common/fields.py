"""Dotted fields of a run's config, as studies write them."""

import json
from dataclasses import fields, is_dataclass, replace


def with_fields(config, overrides):
    """The config with dotted fields replaced, e.g. `{"optim.lr": 1e-3}`; dictionaries get a key.

    Raises:
        ValueError: For a field that the config does not have.
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


def parsed(text):
    """A value from a command line: JSON where it is, text otherwise."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def overridden(items):
    """{field: value} of what `--override FIELD=VALUE ...` was given."""
    return {field: parsed(value) for field, _, value in (item.partition("=") for item in items)}


def override_flag(items):
    """The same as the end of a recorded command; nothing where nothing was given."""
    return " ".join(["", "--override", *items]) if items else ""
