"""A model of a run, a checkpoint or a folder, written in another form, and read again to see that it is the same.

    hf    a folder of Hugging Face's kind, in float32, bfloat16 or float16, of any family
    zig   the folder of a DeepZig model, for the Zig loader: a plain Llama in float32
    abic  the ABIC file of the Zig trainer, floats alone: a plain Llama in float32
    gguf  a file for llama.cpp, of any family but for what it computes otherwise, quantised if asked for

Those of adapters alone are in `exporting_adapters.py`.  The first two are those in which a run may leave its model, by
the same names (`choices.ExportFormat`).
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..choices import ExportFormat
from ..config import TrainableModelConfig
from ..data.tokenizer import Tokenizer
from ..errors import CheckpointError, ConfigError
from ..families import tensor_table, write_config
from ..fields import either
from ..files import check_place, json_text, write_inside
from ..formats.companions import END, GENERATION
from ..formats.deepzig import generation_config, write_model
from ..formats.forms import to_stored
from ..formats.gguf.quantising import file_type
from ..formats.huggingface import read_tensors
from ..formats.safetensors import encoded_size
from ..formats.special_tokens import token_ids
from ..formats.zig import load_abic, misfit, save_abic
from ..model import LoraModel
from ..model.folder import open_weights, read_config
from ..model.folder_writing import DTYPES, new_folder
from ..model.frozen import FrozenModel
from ..model.gguf_writing import plan_gguf
from ..training.loading import holds_adapters, load_model, under_adapters
from .agreement import Agreement, agreement, expected, logits_of
from .export_source import Source
from .exporting_adapters import (
    ADAPTER_FORMATS,
    GGUF_ADAPTER,
    check_adapter_format,
    opens,
    write_adapter_file,
    write_adapters,
)

__all__ = ["ADAPTER_FORMATS", "FORMATS", "Exported", "Source", "check_format", "check_request", "export", "write"]

FORMATS = (*(each.value for each in ExportFormat), "abic", "gguf", *ADAPTER_FORMATS)
# Forms that are one file, and a name for it.
FILES = {"abic": "model.bin", "gguf": "model.gguf", GGUF_ADAPTER: "adapter.gguf"}


# -- what can hold what ------------------------------------------------------------------------------


def check_format(
    form: str,
    shape: TrainableModelConfig | None,
    dtype: str | None,
    max_shard_size: str | None,
    quantize: str | None = None,
) -> None:
    """Raise ConfigError if a form cannot hold a model, or a setting has no effect in it; the reason is named.

    Without a shape, of a model that is not opened yet, what can be told of any.
    """
    if quantize is not None and form not in ("gguf", GGUF_ADAPTER):
        raise ConfigError(f"quantize ({quantize}) acts only with --format gguf; leave it out, or take --dtype")
    if form == "gguf" and dtype is not None:
        raise ConfigError(f"dtype ({dtype}) has no effect on gguf; take --quantize F32, F16, BF16 or Q8_0 and so on")
    if form == "gguf":
        file_type(quantize or "F32")  # raises for an unknown one
    if form == "gguf" and shape is not None:
        plan_gguf(shape, quantize or "F32")
    if form in ("hf", "gguf"):
        return
    if form in ADAPTER_FORMATS:
        check_adapter_format(form, dtype, max_shard_size, quantize)
        return
    if shape is not None and (reason := misfit(shape)):
        raise ConfigError(
            f"format ({form}) holds plain Llama models alone, because the Zig code computes no other, and this has "
            f"{reason}; use --format hf"
        )
    if dtype not in (None, "float32"):
        raise ConfigError(f"dtype ({dtype}) must be float32 for {form}, the only type that the Zig code reads")
    if max_shard_size is not None:
        raise ConfigError(
            f"max_shard_size ({max_shard_size}) acts only with --format hf: in {form} the weights are one file; leave "
            "it out"
        )


def check_request(
    path: Path,
    output: Path,
    form: str,
    *,
    base: Path | None = None,
    dtype: str | None = None,
    max_shard_size: str | None = None,
    quantize: str | None = None,
    force: bool = False,
) -> None:
    """Raise ConfigError for what `export` refuses of any model, before the one in `path` is opened."""
    check_format(form, None, dtype, max_shard_size, quantize)
    if base is None and holds_adapters(path):
        with contextlib.suppress(CheckpointError):  # which is told when they are opened
            base = under_adapters(path)
    _check_output(path, base, None, output, form, force)


def _check_output(model: Path, base: Path | None, run: Path | None, output: Path, form: str, force: bool) -> None:
    """Raise ConfigError for a place that must not be written, or cannot be; `model` and `base` are where these are."""
    place = output.resolve()
    for whose, directory in {"the model's own": model, "that of the base under the adapters": base}.items():
        if directory is not None and place in (directory.resolve(), *directory.resolve().parents):
            raise ConfigError(f"out ({output}) must be another place than {whose}, {directory}")
    inside = next((each for each in (model, base, run) if each and _is_in(place, each)), None)
    if inside is not None and os.path.lexists(output):
        raise ConfigError(f"out ({output}) must not replace what belongs to {inside}; choose another")
    if os.path.lexists(output) and not output.is_dir() and form not in FILES:
        raise ConfigError(f"out ({output}) must be a directory for {form}, and is a file; choose another name")
    filled = output.is_dir() and any(output.iterdir())
    if output.is_dir() and form in FILES:
        name = FILES[form]
        raise ConfigError(f"out ({output}) must be a file for {form}, and is a directory; give a name, as in {name}")
    if os.path.lexists(output) and (filled or not output.is_dir()) and not force:
        raise ConfigError(f"out ({output}) is there already; --force replaces it, or choose another")
    check_place("out", output)


def _talks(source: Source, written: Path) -> bool:
    """Say whether what was written has a tokenizer with a chat template."""
    return source.has_tokenizer and Tokenizer.load(written).chat_template is not None


def _is_in(place: Path, directory: Path) -> bool:
    return directory.is_dir() and directory.resolve() in place.parents


# -- writing and reading again -----------------------------------------------------------------------


@dataclass(frozen=True)
class Exported:
    """What was written: files with their sizes, parameters, and what opens it."""

    files: dict[str, int]
    dtype: str
    parameters: int
    opens: tuple[str, ...]
    errors: Mapping[str, float] | None = None  # of gguf: what a tensor of each type has lost at most
    agreement: Agreement | None = None  # and how near the logits of some tokens are; None where they were not compared


def export(
    source: Source,
    output: Path,
    form: str = "hf",
    *,
    dtype: str | None = None,
    max_shard_size: str | None = None,
    quantize: str | None = None,
    name: str | None = None,
    check: bool = True,
    force: bool = False,
) -> Exported:
    """Write a model and read it again; what was in the place before is only replaced by what is whole.

    quantize   of gguf and gguf-adapter: the type of the file, F32 if none is given
    name       of them: that of the model in it; if none is given, that of the source, of adapters the file's
    check      of them: read it again, and of gguf compare the logits of some tokens with those of the source

    ConfigError for what does not go together; NonFiniteError for weights that are not finite in this type;
    CheckpointError if what was written does not read as the same, or the disk is full.
    """
    if form not in FORMATS:
        raise ConfigError(f"format ({form}) must be {either(list(FORMATS))}")
    check_format(form, source.shape, dtype, max_shard_size, quantize)
    if form in ADAPTER_FORMATS:
        _ = source.adapters  # raises where there are none
    loaded = source.loaded
    _check_output(loaded.directory, loaded.base, loaded.run, output, form, force)
    kind = dtype or (source.dtype if form == "hf" else "float32")
    if form == "gguf":
        kind = file_type(quantize or "F32").name
        return _export_gguf(source, output, kind, max_shard_size, name=name, check=check)
    if form == GGUF_ADAPTER:
        return _export_adapter_file(source, output, (quantize or "F32").upper(), name=name, check=check)
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    write(source, output, form, kind, max_shard_size, source.texts(form))
    files = {output.name: output.stat().st_size} if output.is_file() else {
        path.relative_to(output).as_posix(): path.stat().st_size for path in sorted(output.rglob("*")) if path.is_file()
    }  # fmt: skip
    parameters = source.adapters.num_params() if form in ADAPTER_FORMATS else source.shape.num_params()
    near = _merged_logits(source, output) if form == "hf" else None
    return Exported(files, kind, parameters, _opens(source, output, form), agreement=near)


def _merged_logits(source: Source, output: Path) -> Agreement | None:
    """Return how near the logits of a folder are to those of the adapters beside the model; None without adapters."""
    if not isinstance(source.model, LoraModel):
        return None
    model = source.model
    wanted = expected(lambda ids: logits_of(model, ids), source.shape)
    written = FrozenModel.from_pretrained(output)  # mapped, of any type: a copy may be larger than the memory
    return agreement(wanted.logits, logits_of(written, wanted.ids))


def _export_gguf(
    source: Source, output: Path, quantize: str, largest: str | None, *, name: str | None, check: bool
) -> Exported:
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    model = source.model
    wanted = expected(lambda ids: logits_of(model, ids), source.shape) if check else None
    written = model.write_gguf(output, quantize, name=name or source.name, max_shard_size=largest, check=check)
    near = wanted.compare(written) if wanted is not None else None
    files = {path.name: path.stat().st_size for path in written.files}
    first = written.files[0]
    opens = [f"abi-train {'chat' if _talks(source, first) else 'generate'} {first}"]
    opens += [f"llama.cpp: llama-cli -m {first}"] if source.has_tokenizer else []  # which opens no file without one
    return Exported(files, quantize, source.shape.num_params(), tuple(opens), written.by_type(), near)


def _export_adapter_file(source: Source, output: Path, kind: str, *, name: str | None, check: bool) -> Exported:
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    written = write_adapter_file(source, output, kind, name=name, check=check)
    files = {path.name: path.stat().st_size for path in written.files}
    opened_by = opens(source, output, GGUF_ADAPTER, "")
    return Exported(files, kind, source.adapters.num_params(), opened_by, written.by_type())


def write(
    source: Source,
    output: Path,
    form: str,
    dtype: str,
    max_shard_size: str | None = None,
    files: Mapping[str, str] | None = None,
) -> None:
    """Write a model, and texts by name beside it, and read it again; the rest of what `export` does is the caller's."""
    if form in ADAPTER_FORMATS:
        write_adapters(source, output, form, files or {})
        return
    writers = {"hf": _write_hf, "zig": _write_deepzig, "abic": _write_abic}
    writers[form](source, output, dtype, max_shard_size, files or {})


def _opens(source: Source, output: Path, form: str) -> tuple[str, ...]:
    if form == "abic":
        return ("the Zig trainer, and abi_py: model.load_checkpoint_file(PATH), with a model of its shape",)
    verb = "chat" if _talks(source, output) else "generate"
    ours = f"abi-train {verb} {output}"
    if form in ADAPTER_FORMATS:
        return opens(source, output, form, ours)
    if form == "zig":
        return (ours, "the Zig loader", "transformers, with model_type llama in config.json")
    converts = (f"llama.cpp: convert_hf_to_gguf.py {output}",) if source.has_tokenizer else ()  # it needs one
    return (ours, f"transformers: AutoModelForCausalLM.from_pretrained({str(output)!r})", *converts)


def _write_hf(
    source: Source, output: Path, dtype: str, max_shard_size: str | None, texts: Mapping[str, str]
) -> None:
    model = source.model
    largest = "5GB" if max_shard_size is None else max_shard_size
    model.save_pretrained(output, dtype, largest, files=texts, replace=True)
    shape = read_config(output)
    open_weights(output, shape)  # raises for what does not fit
    wanted = to_stored(*model.stored_tensors(), DTYPES[dtype])
    found = read_tensors(output)
    for name, tensor in wanted.items():
        if name not in found or _digest(tensor.pieces(name)) != _digest([found[name].raw]):
            raise CheckpointError(f"{output}: {name} does not read as it was written; check the disk, and export again")
    _check_tokenizer(source, output, output)


def _digest(pieces: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece.reshape(-1).view("u1").data)
    return digest.hexdigest()


def _check_tokenizer(source: Source, place: Path, output: Path) -> None:
    if source.tokenizer is None:
        return
    written = Tokenizer.load(place)
    if (written.hash, written.chat_template) != (source.tokenizer.hash, source.tokenizer.chat_template):
        raise CheckpointError(f"{output}: its tokenizer does not read as that of {source.loaded.directory}; report it")


def _write_deepzig(
    source: Source, output: Path, dtype: str, max_shard_size: str | None, texts: Mapping[str, str]
) -> None:
    model, codec, stated = _widened(source), source.tokenizer, source.companions.ids
    special = {role: getattr(codec, f"{role}_id", stated.get(f"{role}_token_id")) for role in ("bos", "eos", "pad")}
    files = dict(source.companions.files)
    if GENERATION not in source.loaded.model.companions.files:
        stops = token_ids(json.loads(files.get(GENERATION, "{}")).get(END, []), END, GENERATION)
        files[GENERATION] = json_text(generation_config(source.shape.max_seq_len, special, stops)).encode()
    weights = to_stored(tensor_table(model.config), model.weights)
    files |= {name: text.encode() for name, text in texts.items()}
    with new_folder(output, {*files}, encoded_size(weights), no_tokenizer=True) as new:
        for name, text in files.items():
            write_inside(new, name, [text])
        write_model(new, weights, write_config(model.config), special)
        if load_model(new).model.collect_weights().tobytes() != model.collect_weights().tobytes():
            raise CheckpointError(f"{output} does not read as it was written; check the disk, and export again")
        _check_tokenizer(source, new, output)


def _write_abic(
    source: Source, output: Path, dtype: str, max_shard_size: str | None, texts: Mapping[str, str]
) -> None:
    flat = _widened(source).collect_weights()
    save_abic(output, flat, source.step)
    if load_abic(output).weights.tobytes() != flat.tobytes():
        raise CheckpointError(f"{output} does not read as it was written; check the disk, and export again")


def _widened(source: Source) -> Any:
    model = source.loaded.model.merged()
    return model.widened() if isinstance(model, FrozenModel) else model


