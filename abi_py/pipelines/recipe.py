
"""A recipe: several runs, each from what another one has left, as one file.

    name: csdl-tiny              # what GGUF files are called
    common:                      # settings of every phase that trains: sections of a run's config.yaml
      training: {batch_size: 2}
    phases:                      # in the order in which they are done
      base:                      # a name, which is that of its folder
        leaves_model: model      # keys of `PhaseConfig`
        training: {epochs: 3}    # and sections of a run's config.yaml, which beat the common ones
      tuned:
        after: base              # it starts from what that phase has left
        leaves_adapter: adapter
        lora: {rank: 8}

It is read strictly: an unknown key, a value of the wrong type or a phase that cannot be is a ConfigError with the line.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, shown
from ..fields import Config, closest, fields_of, joined, opt
from ..formats.gguf.quantising import file_type
from ..runs.resolve import switched_on
from ..runs.settings import RUN_SECTIONS, Values
from ..settings_file import read_section, read_sections
from ..untrusted import place_in_yaml, read_yaml

__all__ = ["SHIPPED", "Phase", "PhaseConfig", "Recipe", "place_of_recipe"]

SHIPPED = {"tiny": Path(__file__).with_name("csdl-tiny.yaml")}  # recipes of the package, by name
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
KEYS = ("name", "common", "phases")
# What a phase decides itself, so that a chain can be gone on with.
OWN = {"training": ("checkpoint_path", "export_gguf_path"), "export": ("format",)}


@dataclass(frozen=True, kw_only=True)
class PhaseConfig(Config):
    """What a phase is, beside the settings of its run."""

    after: str | None = opt(None, "phase from whose model it starts; without it, from base, or from random weights")
    rows: int = opt(
        0,
        "how many conversations its data give; another number is an error, and data that are not there yet are planned "
        "by it (0 = not said)",
    )
    leaves_model: str | None = opt(None, "folder for the whole model that it leaves, adapters merged")
    leaves_adapter: str | None = opt(None, "folder for the adapters that it leaves")
    quantize: tuple[str, ...] = opt((), "types of GGUF files to write of that model, in place of training")
    perplexity: str | None = opt(
        None, "text on which these are compared; without it, what the other phase keeps for validation"
    )

    def validate(self) -> None:
        """Raise `ConfigError` naming field, value, rule and remedy."""
        self._require_at_least(0, "rows")
        for name in ("leaves_model", "leaves_adapter"):
            value = getattr(self, name)
            good = value is None or (NAME.fullmatch(value) is not None and value not in ("run", "phase.json"))
            self._require(name, good, "be the name of a folder, of letters, digits, _ . -", "as in final_merged")
        kinds = [file_type(each).name for each in self.quantize]
        twice = next((kind for number, kind in enumerate(kinds) if kind in kinds[:number]), None)
        self._require("quantize", twice is None, f"name {twice} once, it is one file", "leave the other out")


@dataclass(frozen=True)
class Phase:
    """A phase of a recipe.

    settings  of its run, as a config.yaml has them: the common ones under its own
    """

    name: str
    config: PhaseConfig
    settings: dict[str, dict[str, Any]]

    @property
    def trains(self) -> bool:
        """Whether it trains; otherwise it writes GGUF files."""
        return not self.config.quantize


@dataclass(frozen=True)
class Recipe:
    """Phases, in the order of the file."""

    path: Path
    name: str
    phases: tuple[Phase, ...]

    def phase(self, name: str) -> Phase:
        """Return a phase by its name; ConfigError for an unknown one."""
        for phase in self.phases:
            if phase.name == name:
                return phase
        names = ", ".join(phase.name for phase in self.phases)
        raise ConfigError(f"only ({name}) must be a phase of {self.path}: {names}")

    @classmethod
    def read(cls, path: Path) -> "Recipe":
        """Return the recipe of a file; ConfigError with file and line for what is wrong with it."""
        content = read_yaml(path)
        if not isinstance(content, dict) or not isinstance(content.get("phases"), dict) or not content["phases"]:
            raise ConfigError(f"{path} must have `phases:`, and under it a name and settings for each phase")
        for key in content:
            if key not in KEYS:
                hint = closest(str(key), [*KEYS])
                raise ConfigError(f"{place_in_yaml(path, str(key))}: unknown key {shown(key)}; {hint}")
        name = content.get("name", path.stem)
        if not isinstance(name, str) or NAME.fullmatch(name) is None:
            place = place_in_yaml(path, "name")
            raise ConfigError(f"{place}: name ({shown(name)}) must be of letters, digits, _ . -, as in csdl-14b")
        common = read_sections(path, content.get("common"), RUN_SECTIONS, "common")
        phases = list[Phase]()
        for each, values in content["phases"].items():
            phases.append(_read_phase(path, each, values, common, phases))
        return cls(path, name, tuple(phases))


def place_of_recipe(given: str | None) -> Path:
    """Return the file of a recipe: one of the package by its name, the tiny one if none is given, or a path."""
    if given is None or given in SHIPPED:
        return SHIPPED[given or "tiny"]
    path = Path(given)
    if not path.is_file():
        own, is_what = " or ".join(SHIPPED), "that is a directory" if path.is_dir() else "there is no file of that name"
        raise ConfigError(f"RECIPE ({given}) must be a YAML file, or {own}, which comes with the package; {is_what}")
    return path


def _read_phase(path: Path, name: Any, values: Any, common: Values, before: list[Phase]) -> Phase:
    place = place_in_yaml(path, "phases", str(name))
    if not isinstance(name, str) or NAME.fullmatch(name) is None:
        raise ConfigError(f"{place}: phase {shown(name)} must have the name of a folder, of letters, digits, _ . -")
    if not isinstance(values, dict):
        raise ConfigError(f"{place}: phase {name} must hold `key: value` lines; got {shown(values)}")
    own = {option.name for option in fields_of(PhaseConfig)}
    known = [*own, *RUN_SECTIONS]
    for key in values:
        if key not in known:
            where = place_in_yaml(path, "phases", name, str(key))
            raise ConfigError(f"{where}: unknown key {shown(key)} of phase {name}; {closest(str(key), known)}")
    mine = {key: value for key, value in values.items() if key in own}
    rest = {key: value for key, value in values.items() if key not in own}
    given = read_section(path, mine, PhaseConfig, f"phase {name}", "phases", name)
    sections = read_sections(path, rest, RUN_SECTIONS, "phases", name)
    try:
        config = PhaseConfig.from_dict(given)
        _check(name, config, sections, common, before)
    except ConfigError as error:
        raise ConfigError(f"{place}: phase {name}: {error}") from None
    if not config.quantize:
        sections = {
            section: joined(cls, switched_on(cls, common.get(section, {})), sections.get(section, {}))
            for section, cls in RUN_SECTIONS.items()
            if section in common or section in sections
        }
    if config.after is not None:
        sections.pop("base", None)
    return Phase(name, config, sections)


def _check(
    name: str, config: PhaseConfig, sections: Mapping[str, Any], common: Values, before: list[Phase]
) -> None:
    """Raise ConfigError for a phase that cannot be."""
    if config.after is not None:
        known = {phase.name: phase for phase in before}
        if config.after not in known:
            there = ", ".join(known) or "none"
            raise ConfigError(f"after ({config.after}) must be a phase above it in the file; there are: {there}")
        if known[config.after].config.leaves_model is None:
            raise ConfigError(f"after ({config.after}) must leave a model; give that phase leaves_model")
        if "base" in sections:
            raise ConfigError(f"base must be left out: it starts from what {config.after} leaves")
    if config.quantize:
        if config.after is None:
            raise ConfigError("quantize must come with after, the phase whose model is written")
        wrong = next((each for each in ("leaves_model", "leaves_adapter", "rows") if getattr(config, each)), None)
        wrong = wrong or next(iter(sections), None)
        if wrong is not None:
            raise ConfigError(f"{wrong} has no effect on a phase with quantize, which trains nothing; leave it out")
        return
    if config.perplexity is not None:
        raise ConfigError("perplexity acts only with quantize; leave it out")
    if config.leaves_model is None and config.leaves_adapter is None:
        raise ConfigError("leaves_model or leaves_adapter must be given, or nothing comes of it")
    if config.leaves_model is not None and config.leaves_model == config.leaves_adapter:
        raise ConfigError(f"leaves_model and leaves_adapter ({config.leaves_model}) must be two folders")
    for place in (common, sections):
        for section, names in OWN.items():
            own = next((each for each in names if each in place.get(section, {})), None)
            if own is not None:
                raise ConfigError(f"{own} of {section} must be left out: a phase keeps what it writes in its folder")
    lora = {**common.get("lora", {}), **sections.get("lora", {})}
    if config.leaves_adapter is not None and not lora.get("enabled", bool(lora)):
        raise ConfigError(f"leaves_adapter ({config.leaves_adapter}) acts only where adapters are trained; give lora")
    own = sections.get("export", {})
    if "dtype" in own and config.leaves_model is None:
        raise ConfigError("dtype of export acts only with leaves_model: adapters are float32; leave it out")
    encoded = lora.get("enabled", bool(lora)) and lora.get("base_storage")
    if "merge_base" in own and (config.leaves_model is None or not encoded):
        raise ConfigError(
            "merge_base of export acts only with leaves_model, and adapters on a base_storage of lora; leave it out"
        )
