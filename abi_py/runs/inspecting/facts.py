"""What was found out about a path: plain values, ready for a terminal or for JSON."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import AbiError, of_the_system

__all__ = ["Inspection", "TensorFacts"]


@dataclass(frozen=True)
class TensorFacts:
    """One tensor, as the head of its file describes it."""

    name: str
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]
    bytes: int

    @property
    def size(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)


@dataclass
class Inspection:
    """What a path is.

    kind      in words; "unknown" if nothing here knows it
    facts     label -> plain value, in the order in which they are shown
    tensors   those of its weights
    uses      what it can be used for: calls of abi-train, and other programs
    problems  what is damaged, missing, or not computed by this version
    bytes     of the file, or of the files directly in the directory
    """

    path: Path
    kind: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    tensors: list[TensorFacts] = field(default_factory=list)
    uses: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    bytes: int = 0

    def attempt(self, make: Any, *given: Any) -> Any:
        """Return what a function returns; None where it fails, which is a problem."""
        try:
            return make(*given)
        except (AbiError, OSError) as problem:
            self.problems.append(of_the_system(problem) if isinstance(problem, OSError) else str(problem))
            return None

    def dtypes(self) -> dict[str, dict[str, int]]:
        """Return by type the number of tensors, of elements, and the bytes."""
        table: dict[str, dict[str, int]] = {}
        for tensor in self.tensors:
            row = table.setdefault(tensor.dtype, {"tensors": 0, "elements": 0, "bytes": 0})
            row["tensors"] += 1
            row["elements"] += tensor.size
            row["bytes"] += tensor.bytes
        return table

    def to_dict(self, tensors: bool = False) -> dict[str, Any]:
        """Return plain values for JSON; with `tensors`, each of them."""
        content: dict[str, Any] = {"path": str(self.path), "kind": self.kind, "bytes": self.bytes, **self.facts}
        if self.tensors:
            content["tensors"] = {"count": len(self.tensors), "dtypes": self.dtypes()}
        if self.tensors and tensors:
            content["tensors"]["list"] = [
                {"name": t.name, "dtype": t.dtype, "shape": list(t.shape)} for t in self.tensors
            ]
        return {**content, "uses": self.uses, "problems": self.problems}
