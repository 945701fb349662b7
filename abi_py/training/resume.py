"""Putting a checkpoint back into a model and its optimizer; everything is checked before anything is changed."""

from collections.abc import Mapping
from pathlib import Path

from ..errors import CheckpointError
from ..fields import plain
from ..formats.encoded import Encoded
from ..formats.forms import from_stored
from ..formats.safetensors import Stack, Stored
from ..formats.zig import AblcCheckpoint, load_zig
from ..model.lora import LoraModel
from ..model.transformer import Transformer
from ..untrusted import MAX_INT
from .checkpoint import Checkpoint, read_checkpoint
from .moments import MOMENTS
from .optimizer import Optimizer
from .state import TrainingState

__all__ = ["restore", "restore_best", "restore_zig"]

# Fields that mean no other weights.
MAY_DIFFER = {("model", name) for name in ("max_seq_len", "checkpointing", "checkpoint_interval", "seed")}


def restore(model: Transformer, optimizer: Optimizer, path: Path) -> tuple[TrainingState, list[float]]:
    """Restore weights, moments and partial gradients from a checkpoint directory; return its state and loss history.

    CheckpointError if it is damaged, belongs to another model, or to another optimizer.
    """
    loaded = read_checkpoint(path)
    _check_model(model, loaded)
    _check_base(model, loaded)
    gradients, size = loaded.optimizer.get("gradients"), model.parameters.weights_flat.size
    if loaded.state.micro_step and (gradients is None or gradients.size != size):
        raise CheckpointError(f"{path} lacks the partial gradients of its open window; use another checkpoint")
    _put_back(model, optimizer, loaded)
    model.zero_gradients()
    if loaded.state.micro_step:
        model.parameters.gradients_flat[:] = gradients
    return loaded.state, [float(loss) for loss in loaded.optimizer.get("loss_history", ())]


def restore_best(model: Transformer, optimizer: Optimizer, path: Path) -> None:
    """Restore only weights and moments from a checkpoint directory."""
    loaded = read_checkpoint(path)
    _check_model(model, loaded)
    _put_back(model, optimizer, loaded)


def restore_zig(model: Transformer, optimizer: Optimizer, path: Path) -> TrainingState:
    """Restore from an ABLC file, or the weights from an ABIC file (its step goes on, the moments begin anew).

    CheckpointError if it is damaged, of another model, or counts beyond what kernels and our checkpoints can.
    """
    content, flat = load_zig(path), model.parameters.weights_flat
    for name in ("step", "tokens_processed"):
        if getattr(content, name, 0) >= MAX_INT:
            raise CheckpointError(f"{path}: {name} is {getattr(content, name)}, but must be below 2^63; it is damaged")
    if content.weights.size != flat.size:
        sizes = f"holds {content.weights.size} weights, the model {flat.size}"
        raise CheckpointError(f"{path} {sizes}; it is of another model")
    state = TrainingState(global_step=content.step)
    if isinstance(content, AblcCheckpoint):
        stored = {"m": content.m, "v": content.v}
        optimizer.load_flat(stored, content.step)
        state.epoch, state.tokens_processed = content.epoch, content.tokens_processed
    else:
        optimizer.reset()
    state.optimizer_step = optimizer.step
    flat[:] = content.weights
    model.zero_gradients()
    return state


def _check_model(model: Transformer, loaded: Checkpoint) -> None:
    sections = model.sections()
    if ("lora" in loaded.config) != ("lora" in sections):
        kinds = "adapters of LoRA", "a whole model"
        there, here = kinds if "lora" in loaded.config else kinds[::-1]
        raise CheckpointError(f"{loaded.path} holds {there}; trained here: {here}; use a checkpoint of this run")
    for section, config in sections.items():
        stored_values = loaded.config.get(section, {})
        for name, value in config.to_dict().items():
            stored = plain(stored_values.get(name))
            if name in stored_values and (section, name) not in MAY_DIFFER and stored != value:
                raise CheckpointError(
                    f"{loaded.path} is of another model: {name} is {stored} there and {value} here; keep the model's "
                    "shape as its config.yaml has it, or use a checkpoint of this run"
                )
    _tensors_of(model, loaded)


def _check_base(model: Transformer, loaded: Checkpoint) -> None:
    digest = loaded.state.base_digest
    if not (model.identity.has(digest) if isinstance(model, LoraModel) else digest == model.base_digest()):
        raise CheckpointError(
            f"{loaded.path} is of adapters on other weights than these; put them on the model that they were trained on"
        )


def _tensors_of(model: Transformer, loaded: Checkpoint) -> Mapping[str, Stored | Stack | Encoded]:
    """Return the checkpoint's tensors by our names; CheckpointError if one is not as the model has it."""
    return from_stored(model.parameters.table, loaded.weights, loaded.path, "use another checkpoint").tensors


def _put_back(model: Transformer, optimizer: Optimizer, loaded: Checkpoint) -> None:
    moments = {name: array for name, array in loaded.optimizer.items() if name in MOMENTS}
    optimizer.load(moments, loaded.state.optimizer_step)
    for name, tensor in _tensors_of(model, loaded).items():
        tensor.copy_to(model.weights[name])
