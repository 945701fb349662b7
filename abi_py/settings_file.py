"""Sections of settings in a YAML file: read strictly, file and line in every error, and written with their help."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError, shown
from .fields import Config, check_keys, closest, convert, either, fields_of
from .untrusted import place_in_yaml

__all__ = ["read_section", "read_sections", "to_yaml"]


def read_sections(
    path: str | Path, content: Any, sections: Mapping[str, type[Config]], *under: str
) -> dict[str, dict[str, Any]]:
    """Return the sections of what a file holds (`read_yaml`) as plain dictionaries; `under` are the keys above them.

    Sections and keys may be left out, so that flags or defaults can fill them: build the classes with `from_dict`.
    Unknown sections and keys, and values of the wrong type, are `ConfigError`s that name the file.
    """
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must consist of sections ({', '.join(sections)}); got {type(content).__name__}")
    result: dict[str, dict[str, Any]] = {}
    for name, values in content.items():
        if name not in sections:
            owner = [section for section, cls in sections.items() if name in {option.name for option in fields_of(cls)}]
            places = either([f"`{each}:`" for each in owner]) if owner else ""
            hint = f"put it under {places}" if owner else closest(str(name), list(sections))
            raise ConfigError(f"{place_in_yaml(path, *under, str(name))}: unknown section {shown(name)}; {hint}")
        if not isinstance(values, dict | None):
            raise ConfigError(f"{path}: section {name} must hold `key: value` lines; got {shown(values)}")
        result[name] = read_section(path, values or {}, sections[name], f"section {name}", *under, str(name))
    return result


def read_section(
    path: str | Path, values: Mapping[str, Any], cls: type[Config], what: str, *under: str
) -> dict[str, Any]:
    """Return the values of a section, each in the type of its field; `what` is what errors call the section."""
    found, options = dict[str, Any](), {option.name: option for option in fields_of(cls)}
    for key, value in values.items():
        try:
            check_keys(cls, {key: value}, what)
            found[key] = convert(options[key], value)
        except ConfigError as error:
            here = "" if key not in options else f"{what}: "
            raise ConfigError(f"{place_in_yaml(path, *under, str(key))}: {here}{error}") from None
    return found


def to_yaml(without: Collection[str] = (), /, **sections: Config | None) -> str:
    """Return the file's text: `to_yaml(model=..., training=..., early_stopping=...)`; None leaves a section out.

    without  names of fields to leave out
    """
    lines = []
    for name, config in sections.items():
        if config is None:
            continue
        lines.append(f"{name}:")
        values = config.to_dict()
        for option in fields_of(type(config)):
            if option.name not in without:
                lines.append(f"  {option.name}: {_yaml_scalar(values[option.name])}  # {option.help}")
        lines.append("")
    return "\n".join(lines)


def _yaml_scalar(value: Any) -> str:
    # One-element list in flow style: PyYAML then quotes strings exactly where needed, and adds no markers or breaks.
    text = yaml.safe_dump([value], default_flow_style=True, width=1_000_000_000, allow_unicode=True).strip()
    return text[1:-1]
