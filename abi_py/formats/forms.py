"""A model's tensors in the forms in which Hugging Face's files keep them (`parameters.HfName`), both ways.

    as it is     the same matrix (out, in), or vector
    transposed   (in, out)
    a part       one of n equal parts of the out axis: gate and up of a fused gate_up_proj
    per expert   a stored tensor for each of the matrices that ours stacks along its first axis
    stacked      these matrices as one, below each other or their columns in turns: adapters of experts, in PEFT's files

What is read are views of mapped files, and what is written are views of weights, in pieces: nothing is copied but the
stacked, which are small.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from ..errors import CheckpointError
from ..parameters import HfName, Tensor
from .encoded import Encoded
from .merged import Kept
from .safetensors import Joined, Numbers, Stack, Stored

__all__ = ["FromFiles", "from_stored", "stacked", "stored_form", "stored_names", "stored_shape", "to_stored"]


class FromFiles(NamedTuple):
    """Tensors by our names, and the stored ones that they are made of."""

    tensors: dict[str, Stored | Stack | Encoded]
    used: dict[str, Stored | Encoded]


def from_stored(
    table: tuple[Tensor, ...],
    stored: Mapping[str, Stored | Encoded],
    place: object,
    remedy: str,
    bare: Callable[[str], str] = str,
) -> FromFiles:
    """Return the tensors of a table from stored ones, which are called as `bare` calls Hugging Face's names.

    CheckpointError, with the remedy, names one that is missing, of another shape, or not of floats.
    """
    tensors: dict[str, Stored | Stack | Encoded] = {}
    used: dict[str, Stored | Encoded] = {}
    for entry in table:
        form = next((form for form in entry.hf_names if _is_there(form, entry, stored, bare)), entry.hf_names[0])
        each = []
        for name in stored_names(form, entry):
            found, shape = stored.get(bare(name)), stored_shape(form, entry)
            if found is None or found.shape != shape:
                what = "is missing" if found is None else f"has shape {found.shape} instead of {shape}"
                raise CheckpointError(f"{place}: {name} {what}; {remedy}")
            if not found.is_float:
                raise CheckpointError(f"{place}: {name} is {found.raw.dtype}; this version reads floats")
            used[bare(name)] = found
            if isinstance(found, Encoded):
                tensors[entry.name] = _ours_encoded(found, form, f"{place}: {name}")
                continue
            raw = _unstacked(found.raw, form, entry) if form.stacked else _ours(found.raw, form)
            each.append(Stored(raw, found.bf16))
        if entry.name in tensors:
            continue
        tensors[entry.name] = Stack(tuple(each)) if _per_expert(form) else each[0]
    return FromFiles(tensors, used)


def to_stored(
    table: tuple[Tensor, ...], tensors: Mapping[str, Kept], code: str = "F32"
) -> dict[str, Joined]:
    """Return what is written of tensors by our names: by Hugging Face's names, as numbers of the type `code`."""
    parts: dict[str, dict[int, Numbers]] = {}
    forms: dict[str, HfName] = {}
    for entry in table:
        form, tensor = entry.hf_names[0], tensors[entry.name]
        whole = Stored(tensor) if isinstance(tensor, np.ndarray) else tensor
        whole = Stored(stacked(whole.widened(), form)) if form.stacked else whole
        each = [whole.at((e,)) for e in range(entry.shape[0])] if _per_expert(form) else [whole]
        for name, ours in zip(stored_names(form, entry), each, strict=True):
            theirs = ours.turned() if form.transposed and len(ours.shape) > 1 else ours
            parts.setdefault(name, {})[form.part[0]] = theirs
            forms[name] = form
    for name, form in forms.items():
        if sorted(parts[name]) != list(range(form.part[1])):
            raise RuntimeError(f"{name} has {form.part[1]} parts, and tensors of the family are {len(parts[name])}")
    return {
        name: Joined(tuple(parts[name][k] for k in range(form.part[1])), -1 if form.transposed else -2, code)
        for name, form in forms.items()
    }


def _per_expert(form: HfName) -> bool:
    return "{e}" in form.name


def stored_names(form: HfName, entry: Tensor) -> list[str]:
    """Return the names of the stored tensors of which an entry is, or is made."""
    experts = entry.shape[0] if _per_expert(form) else 1
    return [form.name.replace("{e}", str(e)) for e in range(experts)]


def _is_there(form: HfName, entry: Tensor, stored: Mapping[str, Stored | Encoded], bare: Callable[[str], str]) -> bool:
    return any(bare(name) in stored for name in stored_names(form, entry))


def stored_shape(form: HfName, entry: Tensor) -> tuple[int, ...]:
    """Return the shape of a stored tensor of which an entry is, or is made."""
    if form.stacked:
        experts, out, inner = entry.shape
        return (experts * out, inner) if form.stacked == "rows" else (out, inner * experts)
    *before, out, inner = (0, *entry.shape[1 if _per_expert(form) else 0 :])
    if len(before) == 0:  # a vector
        return (inner * form.part[1],)
    out *= form.part[1]
    return (*before[1:], inner, out) if form.transposed else (*before[1:], out, inner)


def stacked(ours: np.ndarray, form: HfName) -> np.ndarray:
    """Return matrices (E, out, in) as the one that is stored."""
    _, out, inner = ours.shape
    return ours.reshape(-1, inner) if form.stacked == "rows" else ours.transpose(1, 2, 0).reshape(out, -1)


def stored_form(ours: np.ndarray, form: HfName) -> np.ndarray:
    """Return one array of ours as it is stored; not one of several parts, or an expert of its own."""
    return stacked(ours, form) if form.stacked else ours.T if form.transposed else ours


def _unstacked(raw: np.ndarray, form: HfName, entry: Tensor) -> np.ndarray:
    """Return the view (E, out, in) of the one matrix that is stored."""
    experts, out, inner = entry.shape
    return raw.reshape(entry.shape) if form.stacked == "rows" else raw.reshape(out, inner, experts).transpose(2, 0, 1)


def _ours_encoded(found: Encoded, form: HfName, where: str) -> Encoded:
    """Return the rows of an encoded matrix that are ours; CheckpointError where they are columns, or experts."""
    if form.transposed or _per_expert(form):
        kind = "stored (in, out)" if form.transposed else "that of an expert"
        raise CheckpointError(f"{where} is encoded, and {kind}, which is not read; take the folder in 16 bits")
    (k, n), rows = form.part, found.shape[0]
    return found.part(k * (rows // n), (k + 1) * (rows // n))


def _ours(raw: np.ndarray, form: HfName) -> np.ndarray:
    """Return the view of a stored array that is a tensor of ours, or of one expert."""
    k, n = form.part
    if raw.ndim < 2:
        size = len(raw) // n
        return raw[k * size : (k + 1) * size]
    out_first = raw.swapaxes(-1, -2) if form.transposed else raw
    size = out_first.shape[-2] // n
    return out_first[..., k * size : (k + 1) * size, :]
