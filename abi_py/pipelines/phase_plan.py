"""What a chain will need, before it begins: rows, steps, time, memory, disk; what is still to come need not be there.

The model that a phase starts from may be one that an earlier phase has yet to leave, or, for a plan alone, one that is
not on this machine: then its shape is that of its config.json, or of section model of the recipe.  Rows of data that
are not there are those that the recipe says.

    time     operations of all tokens / (SHARE x the measured peak of this machine), or the rate of a phase that is done
    memory   as `abi-train run --dry-run` reckons it; a base is narrow where the phase before writes it so
    disk     checkpoints that are kept, one more that is being written, and what is left in the end
"""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..choices import WeightType
from ..config import TrainableModelConfig
from ..errors import ConfigError, counted
from ..runs.base import Base
from ..runs.conversations import find_files, select_chat
from ..runs.opening import OpenData
from ..runs.plan import memory_by_part, trained_tensors
from ..runs.resolve import Given
from ..runs.run import Run
from ..runs.settings import BaseConfig, ChatConfig, DataConfig, ExportConfig
from ..runs.shipped import place_of
from ..untrusted import place_in_yaml
from .chain import RUN, Chain, data_of
from .phase_record import Record
from .recipe import Phase

if TYPE_CHECKING:
    from ..runs.opening import RunData

__all__ = ["SHARE", "Planned", "check_disk", "disk", "plan_phases"]

SHARE = 0.5  # of the peak that a training step reaches; the run at the beginning of README.md has 0.58
NARROW = {WeightType.FLOAT32: 4, WeightType.BFLOAT16: 2, WeightType.FLOAT16: 2}  # bytes of a weight


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What a phase will need; of one that is done, what it has.

    record      of a phase that is done, or None      begun  whether it is half-done
    rows, kept  conversations to train on, and for validation
    counted     whether they were counted; otherwise the recipe says them
    categories  rows of each, training and validation together
    seconds     and whether another phase's rate was measured for that; 0 where nothing is trained
    memory      bytes at the most        disk  bytes that are still to be written
    """

    phase: Phase
    record: Record | None = None
    begun: bool = False
    rows: int = 0
    kept: int = 0
    counted: bool = True
    categories: dict[str, int] = field(default_factory=dict)
    trained: int = 0  # parameters
    steps: int = 0
    seconds: float = 0.0
    measured: bool = False
    memory: int = 0
    disk: int = 0


@dataclass(frozen=True)
class FutureBase(Base):
    """A model that is not there yet, but will have this shape and tokenizer."""

    bytes_of_weight: int = 4

    def check_data(self, data: DataConfig, chat: ChatConfig) -> None:
        """Find nothing wrong: what it reads is not known where it has no tokenizer yet."""
        if self.tokenizer is not None:
            super().check_data(data, chat)

    def frozen_bytes(self, config: TrainableModelConfig, storage: str | None = None) -> int:
        """Return the bytes of memory that its weights take under adapters, encoded in a storage if one is named."""
        from ..families import tensor_table
        from ..model.frozen import storage_named

        total = 0
        for entry in tensor_table(config):
            if storage is not None and entry.hidden:
                total += storage_named(storage).nbytes(entry.size // entry.shape[-1], entry.shape[-1])
            else:
                total += entry.size * (self.bytes_of_weight if len(entry.shape) > 1 else 4)
        return total


class ExpectedRows:
    """Conversations of which only the number is known; each is taken to be as long as a row may be."""

    conversations, info, notes = True, None, ()

    def __init__(self, count: int, longest_row: int, vocab_size: int) -> None:
        """Take the number, and the tokens that a row has at most."""
        self.count, self.longest_row, self.vocab_size = count, longest_row, vocab_size
        self.num_tokens = count * longest_row

    def __len__(self) -> int:
        return self.count

    def num_batches(self, batch_size: int, seq_len: int = 0, drop_last: bool = False) -> int:
        """Return the number of batches of an epoch."""
        return self.count // batch_size if drop_last else -(-self.count // batch_size)

    def summary(self) -> str:
        """Return what it stands for."""
        return counted(self.count, "conversation")


@dataclass(frozen=True)
class _Left:
    """What a phase will leave: the shape of its model, where a tokenizer like its own is, bytes of a weight."""

    shape: TrainableModelConfig
    tokenizer: Path | None
    bytes_of_weight: int


class _Planner:
    def __init__(self, chain: Chain) -> None:
        self.chain, self.left = chain, dict[str, _Left]()
        self.rate = 0.0  # operations in a second, as a phase has reached them

    def plan(self, phase: Phase) -> Planned:
        record = self.chain.done(phase)
        if record is not None:
            figures = record.figures
            rate = figures.get("flops") or 0.0
            self.rate = rate if rate >= 1 else self.rate
            rows, kept, steps = (figures.get(name) or 0 for name in ("rows", "kept", "total_steps"))
            return Planned(phase=phase, record=record, rows=rows, kept=kept, steps=steps)
        text = phase.config.perplexity
        if text is not None and not Path(text).exists():  # not hours later, when the other phases are done
            place = place_in_yaml(self.chain.recipe.path, "phases", phase.name, "perplexity")
            raise ConfigError(f"{place}: phase {phase.name}: perplexity ({text}) does not exist; check the path")
        with self.chain.naming(phase):
            return self._training(phase) if phase.trains else self._quantizing(phase)

    def _training(self, phase: Phase) -> Planned:
        given = self.chain.given(phase, self._base(phase))
        data, is_counted, categories = self._data(phase, given)
        run = given.resolve(data, self.chain.folder(phase) / RUN)
        rows, kept = len(run.train), run.num_kept
        if not is_counted:
            kept = len(cast(ExpectedRows, run.valid)) if run.valid is not None else 0
        export = ExportConfig.from_dict(phase.settings.get("export", {}))
        self.left[phase.name] = _Left(run.config.model, _tokenizer(run), NARROW[export.dtype])
        parts, trained = memory_by_part(run), sum(tensor.size for tensor in trained_tensors(run.config))
        seconds, measured = self._seconds(run)
        return Planned(
            phase=phase,
            begun=self.chain.is_begun(phase),
            rows=rows,
            kept=kept,
            counted=is_counted,
            categories=categories,
            trained=trained,
            steps=run.steps[1],
            seconds=seconds,
            measured=measured,
            memory=sum(parts.values()),
            disk=_disk(phase, run, trained, parts["moments"], NARROW[export.dtype]),
        )

    def _base(self, phase: Phase) -> Base | None:
        """Return what a phase will start from where that is not there yet; None if it is, or there is none."""
        before = self.chain.before(phase)
        if before is not None:
            if self.chain.done(before) is not None:
                return None
            if before.name not in self.left:
                self.plan(before)
            left, place = self.left[before.name], self.chain.model_of(before)
            said = BaseConfig(path=str(place.absolute()))
            return FutureBase(said, place, left.shape, left.tokenizer, bytes_of_weight=left.bytes_of_weight)
        path = phase.settings.get("base", {}).get("path")
        return None if path is None else _absent(Path(path), phase.settings.get("model", {}))

    def _data(self, phase: Phase, given: Given) -> tuple[OpenData, bool, dict[str, int]]:
        """Return the data of a phase, or what stands for them, whether its rows were counted, and their categories."""
        rows, categories = phase.config.rows, dict[str, int]()
        missing = next((path for path in data_of(phase) if not Path(place_of(path)).exists()), None)
        files = [] if missing is not None else find_files(given.data.path, given.chat)
        if files:
            found = select_chat(files, given.chat, given.training.seed).categories()
            categories = dict(sorted(found.items(), key=lambda each: (-each[1], each[0])))
        has_tokenizer = given.opened.tokenizer is not None or given.data.train_tokenizer or given.base is None
        if missing is None and (has_tokenizer or not files):
            data = given.open_data()
            total = len(data.train) + sum(map(len, data.parts.values()))
            if files and rows and rows != total:
                raise ConfigError(f"rows ({rows}) must be {total}, which the data give; correct data or rows")
            return data, True, categories
        if missing is not None and not rows:
            raise ConfigError(f"data ({missing}) must be there, or the phase must say how many rows they give: rows")
        total = rows or sum(categories.values())
        kept = 0 if given.data.valid_path else math.ceil(round(given.data.valid_fraction * total, 9))
        sizes = given.training.max_seq_len, 0 if given.base is None else given.base.shape.vocab_size
        train, valid = (cast("RunData", ExpectedRows(count, *sizes)) for count in (total - kept, kept))
        return OpenData(train, valid if kept else None, sizes[1], given.data), bool(files), categories

    def _seconds(self, run: Run) -> tuple[float, bool]:
        """Return how long a run will take, and whether that was reckoned by a measured rate."""
        from ..kernels.engine.number_formats import PRECISIONS
        from ..kernels.engine.peak import measured_peak
        from ..runs.plan import flops_of_token

        training, total = run.config.training, run.steps[1]
        rate = self.rate or SHARE * measured_peak(number_format=PRECISIONS[training.mixed_precision])
        most = training.batch_size * training.grad_accum_steps * training.max_seq_len * total
        tokens = min(run.train.num_tokens * training.epochs, most)
        if run.valid is not None and training.eval_interval:  # an evaluation is the forward third of a step
            tokens += (total // training.eval_interval + 1) * run.valid.num_tokens // 3
        return tokens * flops_of_token(run.config) / rate, bool(self.rate)

    def _quantizing(self, phase: Phase) -> Planned:
        from ..families import tensor_table
        from ..model.folder import read_config
        from ..model.gguf_writing import plan_gguf

        before = self.chain.recipe.phase(phase.config.after or "")
        if self.chain.done(before) is not None:
            shape = read_config(self.chain.model_of(before))
        else:
            if before.name not in self.left:
                self.plan(before)
            shape = self.left[before.name].shape
        sizes = [plan_gguf(shape, each).nbytes for each in phase.config.quantize]
        largest = 4 * max(tensor.size for tensor in tensor_table(shape))  # the others are mapped
        return Planned(phase=phase, begun=self.chain.is_begun(phase), disk=sum(sizes), memory=largest)


def plan_phases(chain: Chain, phases: Sequence[Phase] | None = None) -> list[Planned]:
    """Return what phases will need, all of a chain if none are given; ConfigError or DataError for what is wrong."""
    planner = _Planner(chain)
    return [planner.plan(phase) for phase in (chain.recipe.phases if phases is None else phases)]


def disk(chain: Chain, plans: Sequence[Planned]) -> tuple[int, int]:
    """Return the bytes that the phases will write, and those that are free."""
    place = chain.out.absolute()
    while not place.exists():
        place = place.parent
    return sum(plan.disk for plan in plans), shutil.disk_usage(place).free


def check_disk(chain: Chain, plans: Sequence[Planned]) -> None:
    """Raise ConfigError if the disk will not do."""
    needed, free = disk(chain, plans)
    if needed > free:
        raise ConfigError(
            f"out ({chain.out}) needs {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free there; take another "
            "disk by --out, fewer types of GGUF files, or a smaller max_checkpoints"
        )


def _absent(path: Path, model: dict[str, Any]) -> FutureBase | None:
    """Return a base that is not on this machine, with the shape of its config.json or of section model; None if it is
    here, or nothing says its shape."""
    from ..formats.huggingface import CONFIG, INDEX, WEIGHTS
    from ..model.folder import read_config

    if path.is_file() or any((path / name).is_file() for name in (WEIGHTS, INDEX)):
        return None
    if (path / CONFIG).is_file():
        shape = read_config(path)
    elif not path.exists() and model.get("hidden_dim"):
        shape = TrainableModelConfig.from_dict(model)
    else:
        return None
    tokenizer = path if (path / "tokenizer.json").is_file() else None
    return FutureBase(BaseConfig(path=str(path.absolute())), path, shape, tokenizer, bytes_of_weight=2)


def _tokenizer(run: Run) -> Path | None:
    """Return where the tokenizer is with which a run's data were opened."""
    return None if run.opened.tokenizer is None else Path(run.opened.tokenizer)


def _disk(phase: Phase, run: Run, trained: int, moments: int, narrow: int) -> int:
    """Return the bytes that a run will have on the disk at most."""
    training, total = run.config.training, run.steps[1]
    saves = -(-total // training.checkpoint_interval) if training.checkpoint_interval else 1
    most = training.max_checkpoints + 2 if training.max_checkpoints else saves + 2  # the best, and one being written
    left = narrow * run.config.model.num_params() if phase.config.leaves_model is not None else 0
    left += 4 * trained if phase.config.leaves_adapter is not None else 0
    return min(saves + 2, most) * (4 * trained + moments) + left

