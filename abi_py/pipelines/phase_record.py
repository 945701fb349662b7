"""What is written of a phase in its folder: phase.json.

It is there from the moment at which the phase begins, and says what it was begun with; once the phase is done, also
what it has left.  So a phase is recognised by what decides its result, and neither a changed setting nor other data are
ever mixed with what there is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..fields import in_words
from ..files import atomic_json
from ..untrusted import read_json

__all__ = ["RECORD", "Record"]

RECORD = "phase.json"
SCHEMA = {"settings": dict[str, Any], "inputs": dict[str, str], "outputs": dict[str, str], "done": bool}
SCHEMA |= {"figures": dict[str, Any]}


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
        values = read_json(folder / RECORD, SCHEMA, remedy=f"remove {folder}, and the phase is done again")
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


def _remedy(folder: Path) -> str:
    return f"take the recipe of before, another --out, or remove {folder} to do the phase again"
