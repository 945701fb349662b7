"""Folders of models, runs, checkpoints, adapters; files of weights."""

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...config import TrainableModelConfig
from ...data.corpus import BYTE_VOCAB_SIZE
from ...errors import CheckpointError, counted
from ...fields import acting
from ...formats.checkpoint_names import TRAINING_ARGS
from ...formats.huggingface import CONFIG, INDEX, WEIGHTS, read_tensors
from ...formats.mlx_lm import MLX_WEIGHTS, is_mlx_adapter, read_mlx_config
from ...formats.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter_config
from ...formats.safetensors import Stored, map_safetensors
from ...formats.special_tokens import special_token_ids
from ...formats.zig import ABIC, ABLC, VERSION
from ...model.folder import config_from_huggingface, open_weights
from ...model.stored_adapter import base_storage_of
from ...training.checkpoint import list_checkpoints, verify
from ...training.finding import find_place
from ...training.loading import under_adapters
from ...training.report import REPORT
from ...untrusted import read_json
from ..directory import CONFIG as RUN_CONFIG
from ..directory import MODEL, root_of_checkpoints
from ..models import find_tokenizer_beside
from ..settings import read_run_config
from .data import describe_tokenizer
from .facts import Inspection, TensorFacts

__all__ = [
    "KNOWN_JSON",
    "adapter",
    "checkpoint",
    "checkpoints",
    "config",
    "describe_shape",
    "folder",
    "index",
    "run",
    "safetensors",
    "tokenizer_beside",
    "uses_of_model",
    "yaml",
    "zig",
]

KNOWN_JSON = {
    "generation_config.json": "generation_config.json: how a model writes",
    "tokenizer_config.json": "tokenizer_config.json: special tokens and chat template of a tokenizer",
    "special_tokens_map.json": "special_tokens_map.json: names of special tokens",
    "report.json": "report.json of a run",
    "state.json": "state.json of a checkpoint",
    TRAINING_ARGS: f"{TRAINING_ARGS} of a run: its settings in the names of TrainingArguments",
}
PICKLE = "pytorch_model.bin"  # never opened
NAMES = {"uint16": "BF16", "float64": "F64", "float32": "F32", "float16": "F16"}  # of Stored's arrays


# -- weights -----------------------------------------------------------------------------------------


def _tensors(stored: Mapping[str, Stored]) -> list[TensorFacts]:
    return [
        TensorFacts(name, "BF16" if t.bf16 else NAMES.get(str(t.raw.dtype), str(t.raw.dtype).upper()), t.raw.shape,
                    t.raw.nbytes)
        for name, t in stored.items()
    ]  # fmt: skip


def safetensors(found: Inspection) -> None:
    """A file of weights alone."""
    found.kind = "file of tensors (safetensors)"
    found.tensors = _tensors(map_safetensors(found.path))
    found.facts["parameters"] = sum(tensor.size for tensor in found.tensors)
    beside = found.path.parent
    if (beside / CONFIG).is_file():
        found.uses.append(f"its folder: abi-train inspect {_quoted(beside)}")
    else:
        found.problems.append(f"no {CONFIG} beside it, so nothing says the shape of its model; copy it there")


def index(found: Inspection) -> None:
    """The index of a folder in shards."""
    found.kind = "index of a model in shards"
    places = read_json(found.path, {"weight_map": dict[str, str]})["weight_map"]
    found.facts |= {"tensors named": len(places), "shards": len(set(places.values()))}
    found.uses.append(f"its folder: abi-train inspect {_quoted(found.path.parent)}")


def zig(found: Inspection) -> None:
    """ABIC or ABLC, by its head."""
    with open(found.path, "rb") as file:
        head = file.read(ABLC.size)
    kind = head[:4].decode()
    layout = ABIC if kind == "ABIC" else ABLC
    found.kind = f"{kind} file of the Zig trainer: weights" + ("" if kind == "ABIC" else " and moments")
    if len(head) < layout.size:
        raise CheckpointError(f"{found.path}: ends at offset {len(head)} inside its head; it is truncated")
    _, version, *numbers = layout.unpack(head[: layout.size])
    counts = numbers[2:] if kind == "ABIC" else numbers[4:]
    found.facts |= {"version": version, "step": numbers[0], "parameters": counts[0]}
    if kind == "ABLC":
        found.facts |= {"epoch": numbers[1], "tokens": numbers[2]}
    found.facts["holds"] = "floats alone: neither the shape of the model nor the names of its tensors"
    if version != VERSION:
        found.problems.append(f"version {version}; this version reads {VERSION}")
    wanted = layout.size + 4 * sum(counts)
    if found.bytes != wanted:
        found.problems.append(f"its head says {counted(wanted, 'byte')}, the file has {found.bytes:,}; it is damaged")
    call = "load_checkpoint_file" if kind == "ABIC" else "load_checkpoint"
    found.uses.append(f"in Python, with a {'model' if kind == 'ABIC' else 'trainer'} of that shape: .{call}(PATH)")


# -- folders -----------------------------------------------------------------------------------------


def _sizes(found: Inspection) -> None:
    files = sorted(path for path in found.path.iterdir() if path.is_file())
    found.facts["files"] = {path.name: path.stat().st_size for path in files}
    found.bytes = sum(found.facts["files"].values())


def describe_shape(found: Inspection, shape: TrainableModelConfig) -> None:
    found.facts["family"] = shape.family.value
    fields = {**shape.to_dict(), "head_dim": shape.resolved_head_dim}
    shown_fields = acting(type(shape), shape.to_dict()) - {*HIDDEN}
    found.facts["shape"] = {name: fields[name] for name in fields if name in shown_fields and fields[name] is not None}
    found.facts["parameters"] = shape.num_params()
    active = shape.num_active_params()
    if active != found.facts["parameters"]:
        found.facts["active parameters"] = active


HIDDEN = ("family", "checkpointing", "checkpoint_interval", "seed")  # of a run, or shown apart


def _model(found: Inspection, place: Path) -> bool:
    """Describe the model in a folder; return whether this version computes it."""
    there = any((place / name).is_file() for name in (WEIGHTS, INDEX, PICKLE))
    stored = found.attempt(read_tensors, place) if there else {}
    found.tensors = _tensors(stored or {})
    path = place / CONFIG
    if not path.is_file():
        found.problems.append(f"no {CONFIG}, which says the shape of the model; copy it there")
        found.facts["parameters"] = sum(tensor.size for tensor in found.tensors)
        return False
    content = found.attempt(read_json, path)
    if content is None:
        return False
    found.facts["model_type"] = content.get("model_type")
    shape = found.attempt(config_from_huggingface, content, str(path))
    if shape is None:
        found.facts["parameters"] = sum(tensor.size for tensor in found.tensors)
        return False
    describe_shape(found, shape)
    if not there:
        found.facts["weights"] = "none here, only the shape of a model"
    if not stored:
        return False
    fits = found.attempt(open_weights, place, shape) is not None
    ends = found.attempt(special_token_ids, place, "eos")
    if ends:
        found.facts["ends a text"] = list(ends)
    return fits


def tokenizer_beside(found: Inspection, place: Path, run: Path | None = None) -> bool:
    """Describe the tokenizer of the model in a folder; return whether there is one with a chat template."""
    where = find_tokenizer_beside(place, run)
    loaded = None if where is None else found.attempt(describe_tokenizer, found, where)
    return loaded is not None and loaded.chat_template is not None


def uses_of_model(found: Inspection, where: Path, talks: bool, adapters: bool = False) -> None:
    name = _quoted(where)
    is_bytes = found.facts.get("shape", {}).get("vocab_size") == BYTE_VOCAB_SIZE  # text is its own ids
    prompt = "--prompt TEXT" if is_bytes or "tokenizer" in found.facts else "--ids '1 2 3'"
    found.uses.append(f"abi-train generate {name} {prompt}")
    if talks:
        found.uses.append(f"abi-train chat {name}")
    found.uses.append(f"abi-train eval {name} DATA")
    if adapters:
        found.uses.append(f"abi-train merge {name} -o FOLDER")
        return
    found.uses.append(f"abi-train run --base {name} --data DATA")
    found.uses.append(f"abi-train export {name} --format hf -o FOLDER")


def folder(found: Inspection) -> None:
    """A folder of Hugging Face's kind, of DeepZig, or weights without a shape."""
    path = found.path
    deepzig = (path / TRAINING_ARGS).is_file()
    found.kind = "folder of a DeepZig model" if deepzig else "folder of Hugging Face's kind"
    _sizes(found)
    if (path / INDEX).is_file() and not (path / WEIGHTS).is_file():
        found.facts["shards"] = len({*path.glob("model-*.safetensors")})
    computed = _model(found, path)
    talks = tokenizer_beside(found, path)
    if computed:
        uses_of_model(found, path, talks)
        found.uses.append(f"transformers: AutoModelForCausalLM.from_pretrained({str(path)!r})")


def config(found: Inspection, content: Mapping[str, Any]) -> None:
    """A config.json alone."""
    found.kind = f"{CONFIG} of a model"
    found.facts["model_type"] = content.get("model_type")
    shape = found.attempt(config_from_huggingface, content, str(found.path))
    if shape is not None:
        describe_shape(found, shape)
    beside = found.path.parent
    if any((beside / name).is_file() for name in (WEIGHTS, INDEX)):
        found.uses.append(f"its folder: abi-train inspect {_quoted(beside)}")


def adapter(found: Inspection) -> None:
    """Adapters in the form of PEFT or mlx-lm."""
    path, theirs = found.path, is_mlx_adapter(found.path)
    found.kind = f"adapters of LoRA ({'mlx-lm' if theirs else 'PEFT'})"
    _sizes(found)
    content = found.attempt(read_mlx_config if theirs else read_adapter_config, path)
    weights = path / (MLX_WEIGHTS if theirs else ADAPTER_WEIGHTS)
    if weights.is_file():
        found.tensors = _tensors(found.attempt(map_safetensors, weights) or {})
    else:
        found.problems.append(f"{ADAPTER_WEIGHTS} is missing; copy the folder again")
    found.facts["parameters"] = sum(tensor.size for tensor in found.tensors)
    if content is None:
        return
    if theirs:
        said = content["lora_parameters"]
        found.facts |= {"rank": said.get("rank"), "scale": said.get("scale"), "adapted": said.get("keys")}
        found.facts["base"] = content.get("model")
    else:
        found.facts |= {"rank": content.get("r"), "alpha": content.get("lora_alpha")}
        found.facts |= {"adapted": _adapted(content), "base": content.get("base_model_name_or_path")}
        kept_in = found.attempt(base_storage_of, path) if weights.is_file() else None
        found.facts |= {"trained on base in": kept_in} if kept_in else {}
    below = found.attempt(under_adapters, path)
    if not found.problems:
        found.facts["base"] = below if below is not None else "random weights, made again from their seed"
        uses_of_model(found, path, tokenizer_beside(found, path), adapters=True)


# -- runs --------------------------------------------------------------------------------------------


def _describe_state(found: Inspection, state: Mapping[str, Any]) -> None:
    found.facts |= {"step": state.get("global_step"), "epochs done": state.get("epoch")}
    found.facts["tokens trained on"] = state.get("tokens_processed")
    loss = state.get("best_val_loss")
    if isinstance(loss, float) and math.isfinite(loss):
        found.facts |= {"best validation loss": loss, "of step": state.get("best_step")}


def checkpoint(found: Inspection) -> None:
    """A checkpoint, held against its checksums."""
    found.kind = "checkpoint of a run"
    _sizes(found)
    whole = found.attempt(verify, found.path)
    if whole is not None:
        _describe_state(found, whole["state"])
    if (found.path / ADAPTER_CONFIG).is_file():
        found.kind = "checkpoint of a run of adapters"
        files, kind = found.facts["files"], found.kind
        adapter(found)
        found.kind, found.facts["files"] = kind, files
        computed = False
    else:
        computed = _model(found, found.path) and whole is not None
    talks = tokenizer_beside(found, found.path)
    if computed:
        uses_of_model(found, found.path, talks)
    if whole is not None:
        found.uses.append(f"abi-train resume {_quoted(found.path)}")


def checkpoints(found: Inspection, places: list[Path]) -> Path | None:
    """List checkpoints; return the newest whole one."""
    good: list[Path] = []
    for place in places:
        if found.attempt(verify, place) is not None:
            good.append(place)
    damaged = len(places) - len(good)
    found.facts["checkpoints"] = [place.name for place in places]
    if damaged:
        found.facts["whole checkpoints"] = [place.name for place in good]
    if not good:
        return None
    _describe_state(found, read_json(good[-1] / "state.json")["state"])
    found.uses.append(f"abi-train resume {_quoted(found.path)}")
    return good[-1]


def run(found: Inspection) -> None:
    """The directory of a run."""
    path = found.path
    found.kind = "run"
    _sizes(found)
    settings = found.attempt(read_run_config, path / RUN_CONFIG) or {}
    if data := settings.get("data"):
        found.facts["data"] = list(data.get("path") or ()) or "Python's standard library"
    if base := settings.get("base"):
        found.facts["started from"] = base
    if (path / REPORT).is_file():
        report = found.attempt(read_json, path / REPORT) or {}
        found.facts["ended"] = "stopped by a signal" if report.get("interrupted") else "at its end"
    else:
        found.facts["ended"] = "not yet, or killed: there is no report.json"
    used = found.attempt(find_place, path) if (path / MODEL).is_dir() else None
    if used is not None and used.said:
        found.facts["verbs use"] = used.said
    places = [place for _, place in list_checkpoints(root_of_checkpoints(path))]
    if not places and used is not None:
        if _model(found, used.folder):
            uses_of_model(found, path, tokenizer_beside(found, used.folder, path))
        return
    if not places:
        found.facts["checkpoints"] = []
        found.uses.append(f"abi-train resume {_quoted(path)}, which begins it again")
        return
    newest = checkpoints(found, places)
    if newest is None:
        return
    if (newest / ADAPTER_CONFIG).is_file():
        found.kind, lora = "run of adapters", settings.get("lora", {})
        found.facts |= {"rank": lora.get("rank"), "adapted": _adapted(lora)}
        if found.attempt(under_adapters, newest) or not found.problems:
            uses_of_model(found, path, tokenizer_beside(found, newest, path), adapters=True)
        return
    if _model(found, newest):
        uses_of_model(found, path, tokenizer_beside(found, newest, path))


def yaml(found: Inspection) -> None:
    """The settings of a run."""
    found.kind = f"settings of a run ({RUN_CONFIG})"
    sections = read_run_config(found.path)
    found.facts["sections"] = {name: counted(len(values), "setting") for name, values in sections.items()}
    found.uses.append(f"abi-train run --config {_quoted(found.path)}")


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _adapted(content: Mapping[str, Any]) -> Any:
    """Return what adapters are put on, by what a folder or a run says: modules, and stacks of experts."""
    modules, stacks = content.get("target_modules"), content.get("target_parameters")
    if not isinstance(stacks, list):
        return modules
    return [*([modules] if isinstance(modules, str) else modules or []), *stacks]
