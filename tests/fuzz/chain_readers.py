"""A chain of runs: its recipe, and the records of its phases."""

import contextlib
from pathlib import Path

from reader import Reader

from abi_py.errors import CheckpointError, ConfigError
from abi_py.pipelines.chain import Chain, data_of, table_text
from abi_py.pipelines.phase_record import RECORD, Record
from abi_py.pipelines.recipe import Recipe

CHAIN = """
name: small
common:
  training: {epochs: 1, max_seq_len: 16, learning_rate: 1.0e-3}
phases:
  first:
    leaves_model: m
    rows: 3
    data: {path: [a.jsonl], valid_fraction: 0.5, check_json: 0}
    chat: {template: chatml, category: ['x_*', y]}
  two: {after: first, leaves_adapter: a, lora: {rank: 2, target_modules: [q_proj]}}
  files: {after: first, quantize: [F16, q8_0], perplexity: a.txt}
"""


def _recipe(folder: Path) -> None:
    (folder / "r.yaml").write_text(CHAIN)


def _read_recipe(folder: Path) -> Chain:
    chain = Chain(Recipe.read(folder / "r.yaml"), folder / "out")
    for phase in chain.recipe.phases:
        chain.settings(phase), chain.names(phase), data_of(phase)
    return chain


PHASES = ("first", "files", "done")


def _phases(folder: Path) -> None:
    """Write the records of a chain: one that was stopped in its training, one that is done, and GGUF files."""
    for name, key in (("first", "m"), ("files", "quantize")):
        (folder / name).mkdir()
        settings = {"phase": {"after": None, "leaves_model": key}, "training": {"epochs": 1, "learning_rate": 1e-3}}
        Record(settings, {"data (a.jsonl)": "0" * 64}).write(folder / name)
    (folder / "done").mkdir()
    made = {"bytes": 10, "bits_per_weight": 8.5, "perplexity": 2.5, "change": 0.25}
    figures = {"types": {"F16": made, "Q8_0": made}, "on": "1 conversation", "perplexity": 2.0, "total_steps": 3}
    figures |= {"rows": 3, "kept": 1, "flops": 1e9, "json": {"asked": 1}}
    Record({"lora": {"rank": 2}}, {}, {"x.gguf": "0" * 64, "table.md": "1" * 64}, figures, True).write(folder / "done")


def _read_phases(folder: Path) -> None:
    for name in PHASES:
        record = Record.read(folder / name)
        if record is None:
            continue
        for check in (
            lambda record=record: record.check_settings(folder, {"lora": {"rank": 2}, "training": {"epochs": 1}}),
            lambda record=record: record.check_inputs(folder, {"data (a.jsonl)": "0" * 64}),
            lambda record=record: record.check_done(folder, ("x.gguf", "table.md"), "types"),
        ):
            with contextlib.suppress(ConfigError, CheckpointError):
                check()
        if record.figures.get("types") is not None:
            table_text(record.figures)


CHAINS = (
    Reader("recipe", _recipe, ("r.yaml",), _read_recipe, share=2),
    Reader("phases", _phases, tuple(f"{name}/{RECORD}" for name in PHASES), _read_phases, share=20),
)
