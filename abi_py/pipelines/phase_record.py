"""What is written of a phase in its folder: phase.json.

It is there from the moment at which the phase begins, and says what it was begun with; once the phase is done, also
what it has left.  So a phase is recognised by what decides its result, and neither a changed setting nor other data are
ever mixed with what there is.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError, listed, shown
from ..fields import in_words
from ..files import atomic_json
from ..untrusted import check, read_json

__all__ = ["RECORD", "Record"]

RECORD = "phase.json"
# What is read of the figures; the others are for people.
FIGURES: dict[str, Any] = {"rows": int | None, "kept": int | None, "total_steps": int | None, "flops": float | None}
FIGURES |= {"types": dict[str, dict[str, Any]] | None}
OF_TYPE: dict[str, Any] = {"bytes": int, "bits_per_weight": float}
# ... and where GGUF files were measured.
MEASURED: dict[str, Any] = {"on": str, "perplexity": float}
OF_MEASURED = OF_TYPE | {"perplexity": float, "change": float}
SCHEMA: dict[str, Any] = {"settings": dict[str, dict[str, Any]], "inputs": dict[str, str], "outputs": dict[str, str]}
SCHEMA |= {"figures": FIGURES, "done": bool}


@dataclass(frozen=True)
class Record:
    """A phase.

    settings  section -> field -> value, as the recipe has them; what changes no bits is left out
    inputs    what it reads -> SHA-256: files of data, the weights that it starts from
    outputs   names in its folder -> SHA-256
    figures   what is told of the result
    """

    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    outputs: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)
    done: bool = False

    @classmethod
    def read(cls, folder: Path) -> "Record | None":
        """Return that of a folder, None if it was never begun; CheckpointError if it is damaged."""
        if not (folder / RECORD).is_file():
            return None
        values = read_json(folder / RECORD, SCHEMA, remedy=_again(folder))
        figures, is_measured = values["figures"], "perplexity" in values["figures"]
        check(figures, MEASURED if is_measured else {}, f"{folder / RECORD}: figures", remedy=_again(folder))
        for kind, row in (figures.get("types") or {}).items():
            of_type = OF_MEASURED if is_measured else OF_TYPE
            check(row, of_type, f"{folder / RECORD}: types {shown(kind)}", remedy=_again(folder))
        return cls(**{name: values[name] for name in SCHEMA})

    def write(self, folder: Path) -> None:
        """Write it in one indivisible step."""
        atomic_json(folder / RECORD, {name: getattr(self, name) for name in SCHEMA})

    def check_settings(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Raise ConfigError if a phase was begun with other settings than these, which names the first."""
        for section in dict.fromkeys((*settings, *self.settings)):
            now, then = settings.get(section, {}), self.settings.get(section, {})
            for name in dict.fromkeys((*now, *then)):
                if now.get(name) != then.get(name):
                    raise ConfigError(
                        f"{section}.{name} ({in_words(now.get(name))}) is not that with which {folder} was begun "
                        f"({in_words(then.get(name))}); {_remedy(folder)}"
                    )

    def check_inputs(self, folder: Path, inputs: Mapping[str, str]) -> None:
        """Raise ConfigError if a phase was begun with other inputs than these, which names the first."""
        for name in dict.fromkeys((*inputs, *self.inputs)):
            if inputs.get(name) != self.inputs.get(name):
                raise ConfigError(f"{name} is not what it was when {folder} was begun; {_remedy(folder)}")

    def check_done(self, folder: Path, names: Collection[str], figure: str) -> None:
        """Raise CheckpointError if the record of a phase that is done names other outputs, or lacks a figure."""
        if self.outputs.keys() != set(names) or self.figures.get(figure) is None:
            left = listed([*names], 3)
            raise CheckpointError(f"{folder / RECORD} does not say what its phase leaves, {left}; {_again(folder)}")


def _again(folder: Path) -> str:
    return f"remove {folder}, and the phase is done again"


def _remedy(folder: Path) -> str:
    return f"take the recipe of before, another --out, or remove {folder} to do the phase again"
