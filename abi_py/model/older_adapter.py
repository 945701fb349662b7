"""PEFT's adapters of experts from before version 5 of the Transformers library, when each matrix was a linear module.

    model.layers.0.block_sparse_moe.gate.lora_A.weight            (R, in)      Mixtral's router, mlp.gate of Qwen3-MoE
    model.layers.0.block_sparse_moe.experts.3.w1.lora_A.weight    (R, in)      w1 w3 w2, or gate_proj up_proj down_proj
    model.layers.0.block_sparse_moe.experts.3.w1.lora_B.weight    (out, R)

They become what PEFT makes of them now: of gate and up, two adapters in one of twice the rank, whose A has the rows of
both, and whose B has theirs on the diagonal and zeros beside it.
"""

import numpy as np

from ..config import TrainableModelConfig
from ..errors import CheckpointError, ConfigError
from ..families import layers
from ..formats.forms import stacked
from ..formats.peft import AdapterFolder
from .expert_modules import ExpertParameter, as_parameters, expert_parameters, means_experts, on_diagonal
from .lora_targets import PREFIX, Kind, Target, candidates, chosen_targets

__all__ = ["modernised"]


def modernised(found: AdapterFolder, shape: TrainableModelConfig, place: object) -> AdapterFolder:
    """Return what a folder holds with target parameters in place of modules that were experts or routers.

    Dropout, which such parameters cannot have, is left out: it acts in training only.  CheckpointError for one without
    the other of A and B or of the experts, of another shape, or with lengths of rows (DoRA).
    """
    parameters = expert_parameters(shape, layers(shape))
    if not means_experts(found.config, parameters):
        return found
    try:
        config = as_parameters(found.config.replace(dropout=0.0), parameters, candidates(shape))
    except ConfigError as error:
        raise CheckpointError(f"{place}: {error}") from None
    tensors, made = dict(found.tensors), dict[str, np.ndarray]()
    targets = {target.module: target for target in chosen_targets(shape, config)}
    for parameter in parameters:
        if parameter.name in targets:
            made |= _taken(tensors, parameter, targets[parameter.name], found, place)
    return AdapterFolder(config, tensors | made, found.base_model)


def _taken(
    tensors: dict[str, np.ndarray], parameter: ExpertParameter, target: Target, found: AdapterFolder, place: object
) -> dict[str, np.ndarray]:
    """Take the adapters of a parameter's former modules out of `tensors`; return them as they are called now."""
    experts = 1 if target.kind is Kind.ROUTER else target.tensor.shape[0]
    made = {}
    for half, join in (("A", lambda parts: np.concatenate(parts, axis=1)), ("B", on_diagonal)):
        names = [
            [f"{PREFIX}{module}.lora_{half}.weight".replace("{e}", str(e)) for e in range(experts)]
            for module in parameter.modules
        ]
        if not any(name in tensors for some in names for name in some):
            continue  # called as they are now, or not there
        whole = join([
            np.stack([_checked(tensors, name, parameter, k, half, found, place) for name in some])
            for k, some in enumerate(names)
        ])
        form, _ = target.parts()[half.lower()]
        made[form.name] = stacked(whole, form) if form.stacked else whole[0]
    return made


def _checked(
    tensors: dict[str, np.ndarray],
    name: str,
    parameter: ExpertParameter,
    k: int,
    half: str,
    found: AdapterFolder,
    place: object,
) -> np.ndarray:
    """Take a tensor out, of the k-th of the parameter's matrices."""
    rank = found.config.rank_of(parameter.modules[k].replace("{e}", "0"))
    outer, inner = parameter.tensors[k].shape[-2:]
    wanted, tensor = (rank, inner) if half == "A" else (outer, rank), tensors.pop(name, None)
    if tensor is None or tensor.shape != wanted:
        what = "is missing" if tensor is None else f"has shape {tensor.shape}"
        rule = f"rank {rank} on this model takes {wanted}; load it on the model it is of"
        raise CheckpointError(f"{place}: {name} {what}; {rule}")
    return tensor
