"""The directory of a run, and that of its checkpoints: what goes on from it, and what it left."""

import contextlib
import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reader import SHAPE, Reader, small_model, write_json

from abi_py.choices import ExportFormat
from abi_py.errors import AbiError
from abi_py.formats.checkpoint_names import CARD, ORIGIN
from abi_py.runs.directory import ADAPTER, MODEL
from abi_py.runs.export_source import Source
from abi_py.runs.inspecting import inspect
from abi_py.runs.models import find_model
from abi_py.runs.resolve import Given
from abi_py.runs.resuming import Resumed
from abi_py.runs.training import train_run
from abi_py.training.finding import BEST, LAST
from abi_py.training.loggers import kept_id

TRAINING = {"max_seq_len": 8, "batch_size": 2, "max_steps": 2, "eval_interval": 1, "checkpoint_interval": 1}
CHECKPOINT = "run/checkpoints/llm_step_2"


def mending(checkpoint: str) -> Callable[[Path], None]:
    """Return what makes sizes, hashes and checksum of a damaged checkpoint fit, so that more than these is tried."""

    def mend(folder: Path) -> None:
        state = folder / checkpoint / "state.json"
        try:
            content = json.loads(state.read_bytes())
            for name in content["files"]:
                raw = (state.parent / name).read_bytes()
                content["files"][name] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
            content.pop("checksum", None)
            text = json.dumps(content, sort_keys=True).encode()
            state.write_text(json.dumps({**content, "checksum": hashlib.sha256(text).hexdigest()}))
        except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError):
            return

    return mend


def _train(folder: Path, **sections: Any) -> None:
    (folder / "x.txt").write_text("one text, and another one\n" * 20)
    texts = {"path": str(folder / "x.txt"), "valid_path": str(folder / "x.txt")}
    given = Given({"training": TRAINING, "data": texts, **sections}, {})
    train_run(given.resolve(given.open_data(), folder / "run"))


def _run(folder: Path) -> None:
    _train(folder, model={**SHAPE, "num_layers": 1})


def _run_of_adapters(folder: Path) -> None:
    small_model(num_layers=1, vocab_size=257).save_pretrained(folder / "base", "bfloat16")
    lora = {"enabled": True, "rank": 2, "target_modules": ("q_proj",)}
    _train(folder, base={"path": str(folder / "base")}, lora=lora)


def _run_that_never_saved(folder: Path) -> None:
    _run(folder)
    shutil.rmtree(folder / "run" / "checkpoints")
    shutil.rmtree(folder / "run" / MODEL)


def _each(*readings: Callable[[], Any]) -> None:
    """Read in several ways: what one refuses the next one is given all the same."""
    for reading in readings:
        with contextlib.suppress(AbiError, FileNotFoundError):
            reading()


def _resume(run: Path) -> None:
    resumed = Resumed.find(run, {}, lambda text: None)
    resumed.finished(None)
    resumed.open(resumed.reschedule(None))


def _export(run: Path) -> None:
    source = Source.open(run)
    _ = source.name, source.tokenizer, source.companions, source.type_of_base
    for form in ExportFormat:
        source.texts(form.value)


def _read_run(folder: Path) -> None:
    run = folder / "run"
    _each(
        functools.partial(_resume, run),
        functools.partial(_export, run),
        functools.partial(find_model, run, LAST),
        functools.partial(find_model, run, BEST),
        functools.partial(inspect, run),
        functools.partial(inspect, run / "checkpoints"),
    )


def _read_run_of_adapters(folder: Path) -> None:
    _read_run(folder)
    run = folder / "run"
    _each(
        functools.partial(Source.open, run, adapters=True),
        functools.partial(find_model, run / ADAPTER),
        functools.partial(find_model, run / ADAPTER, original=True),
    )


def _wandb(folder: Path) -> None:
    write_json(folder / "wandb.json", {"id": "3f"})


SETTINGS = ("run/config.yaml", "run/report.json", "run/metrics.jsonl")
OF_CHECKPOINT = (f"{CHECKPOINT}/state.json", f"{CHECKPOINT}/config.yaml")
OF_MODEL = tuple(f"run/{MODEL}/{name}" for name in ("config.json", "generation_config.json", ORIGIN, CARD))
OF_ADAPTER = tuple(f"run/{ADAPTER}/{name}" for name in ("adapter_config.json", "adapter_model.safetensors", ORIGIN))
RUNS = (
    Reader("run", _run, (*SETTINGS, *OF_CHECKPOINT, *OF_MODEL), _read_run),
    Reader("run of adapters", _run_of_adapters, (*SETTINGS, *OF_CHECKPOINT, *OF_ADAPTER), _read_run_of_adapters),
    Reader("mended run", _run, OF_CHECKPOINT, _read_run, mending(CHECKPOINT)),
    Reader("mended run of adapters", _run_of_adapters, OF_CHECKPOINT, _read_run_of_adapters, mending(CHECKPOINT)),
    Reader("run that never saved", _run_that_never_saved, SETTINGS, _read_run),
    Reader("id for W&B", _wandb, ("wandb.json",), kept_id, share=2),
)
