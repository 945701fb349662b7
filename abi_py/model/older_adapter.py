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
from ..formats.peft import AdapterFolder
from .expert_modules import ExpertParameter, as_parameters, expert_parameters, means_experts
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
    halves: dict[str, list[list[np.ndarray]]] = {"A": [], "B": []}
    for half, each in halves.items():
        names = [
            [f"{PREFIX}{module}.lora_{half}.weight".replace("{e}", str(e)) for module in parameter.modules]
            for e in range(experts)
        ]
        if not any(name in tensors for some in names for name in some):
            continue  # called as they are now, or not there
        for some in names:
            each.append([_checked(tensors, name, parameter, k, half, found, place) for k, name in enumerate(some)])
    a, b = (target.parts()[half][0].name for half in "ab")
    if target.kind is Kind.ROUTER:
        return {name: some[0][0] for name, some in zip((a, b), halves.values(), strict=True) if some}
    made = {}
    if halves["A"]:  # (E R, in)
        made[a] = np.concatenate([rows for some in halves["A"] for rows in some])
    if halves["B"]:  # (out, R E): columns of the experts in turns
        made[b] = np.stack([_diagonal(some) for some in halves["B"]], axis=-1).reshape(target.tensor.shape[1], -1)
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


def _diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    """Return matrices below each other, each in columns of its own, and zeros beside them."""
    made = np.zeros((sum(len(each) for each in blocks), sum(each.shape[1] for each in blocks)), blocks[0].dtype)
    row = column = 0
    for each in blocks:
        made[row : row + len(each), column : column + each.shape[1]] = each
        row, column = row + len(each), column + each.shape[1]
    return made
