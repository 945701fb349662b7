"""Which parts of a model get adapters or are trained whole, and their tensors.

    named            a configuration with the targets that a model has; what it has not is refused
    trained_table    all that is trained, in flat order: adapters, then copies of what is trained whole

A copy is trained in float32 in place of the frozen tensor, whose layer takes the one for the other: a bias, a norm, the
embedding, or all of a linear layer.  Where embedding and head are one matrix (tied) and are not trained as one, the
layers are those of the same model untied (`trained_shape`), as PEFT has them.

Longer than 400 lines because what a setting means, and what of it means nothing, follow from the same lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TypeVar

from ..config import LoraConfig, TrainableModelConfig
from ..errors import ConfigError, shown
from ..families import layers, tensor_table
from ..fields import either
from ..lora_config import is_expression
from ..parameters import HfName, Tensor
from .expert_modules import as_parameters, expert_parameters
from .layers.embedding import Embedding
from .layers.experts import Experts
from .layers.layer import Layer
from .layers.linear import Linear

__all__ = [
    "PREFIX",
    "Kind",
    "Target",
    "candidates",
    "chosen_targets",
    "copies",
    "end_targets",
    "expert_targets",
    "linear_targets",
    "named",
    "num_trained",
    "report",
    "router_targets",
    "trained_shape",
    "trained_table",
    "without_unused",
]

AnyLora = TypeVar("AnyLora", bound=LoraConfig)

PARTS = "abm"  # what an adapter is made of: A, B, and with DoRA the lengths of the rows, or of a table's columns
PREFIX = "base_model.model."  # of PEFT's names of tensors
_IDLE = "fits no adapter that one before it does not fit; leave it out, or write the end of a module's name"
IDLE = {  # what is said of a name without effect
    "exclude_modules": "leaves out no projection of this model; leave it out, or write the end of a module's name",
    "layers_pattern": "stands before no block's number in this model's names; leave it out",
    "rank_pattern": _IDLE,
    "alpha_pattern": _IDLE,
}


def report(shape: TrainableModelConfig, config: LoraConfig) -> str:
    """Return how much is trained of adapters on such a model, in one line; no model is needed."""
    config, whole = named(shape, config), shape.num_params()
    table = trained_table(shape, config)
    trained = sum(entry.size for entry in table)
    ranks = sorted({target.rank for target in chosen_targets(shape, config)})
    what = f"rank {', '.join(map(str, ranks))}: "
    what += ", ".join([*(config.target_modules or ()), *(config.target_parameters or ())])
    what += ", with lengths of rows (DoRA)" if config.use_dora else ""
    copied = [entry for entry in table if not _is_adapter(entry)]
    more = f"; {sum(entry.size for entry in copied):,} of them in {len(copied)} tensors trained whole" if copied else ""
    return f"{trained:,} trained parameters, {100 * trained / whole:.2f} % of {whole:,} ({what}){more}"


def num_trained(shape: TrainableModelConfig, config: LoraConfig) -> int:
    """Return the number of weights of all adapters, and of what is trained whole."""
    return sum(entry.size for entry in trained_table(shape, named(shape, config)))


# -- what a configuration means on a model ----------------------------------------------------------


class Kind(Enum):
    """What an adapter is put on."""

    LINEAR = "part of a linear layer"
    TABLE = "table of the embedding"
    HEAD = "head"
    ROUTER = "router of experts"
    EXPERTS = "stack of experts' matrices"


@dataclass(frozen=True)
class Target:
    """What gets an adapter: a part of a linear layer, a table of the embedding, the head, a router, a stack of experts.

    A stack is what the Transformers library has as one parameter: gate and up, or down.  `tensor` is then that one.
    """

    index: int  # of a part in its layer
    tensor: Tensor  # its matrix
    stream: int  # its number among all parts of the model
    module: str  # the Transformers library's name of it; of a router or a stack, of the parameter
    rank: int
    scale: float
    kind: Kind = Kind.LINEAR
    matrices: tuple[str, ...] = ()  # of a stack: our local names of what it is made of
    inside: bool = False  # of a stack: PEFT has it inside the adapter of the other one

    def parts(self) -> dict[str, tuple[HfName, tuple[int, ...]]]:
        """Return PEFT's names of A, B and the lengths of DoRA, and their shapes here: of a table A is (V, R)."""
        *experts, outer, inner = self.tensor.shape
        at = f"{PREFIX}{self.module}.lora_"
        if self.kind is Kind.EXPERTS:
            at = f"{PREFIX}{self.module.rpartition('.')[0]}.{'base_layer.' * self.inside}lora_"
            return {
                "a": (HfName(f"{at}A.weight", stacked="rows"), (*experts, self.rank, inner)),
                "b": (HfName(f"{at}B.weight", stacked="columns"), (*experts, outer, self.rank)),
            }
        if self.kind is Kind.ROUTER:
            at = f"{PREFIX}{self.module.rpartition('.')[0]}.lora_"
        if self.kind is Kind.TABLE:
            a, b = HfName(f"{at}embedding_A", transposed=True), HfName(f"{at}embedding_B")
            lengths = HfName(f"{at}magnitude_vector"), (inner,)  # of columns: PEFT has the table as a matrix (C, V)
            return {"a": (a, (outer, self.rank)), "b": (b, (inner, self.rank)), "m": lengths}
        return {
            "a": (HfName(f"{at}A.weight"), (self.rank, inner)),
            "b": (HfName(f"{at}B.weight"), (outer, self.rank)),
            "m": (HfName(f"{at}magnitude_vector"), (outer,)),
        }


def _module(tensor: Tensor) -> str:
    """Return the Transformers library's name of the module that a tensor is a weight of.

    Of several names in files the last is the one that the library has in memory.
    """
    return tensor.hf_names[-1].name.rpartition(".")[0]


def trained_shape(shape: TrainableModelConfig, config: LoraConfig) -> TrainableModelConfig:
    """Return the shape of the layers: untied where embedding and head are not trained as one matrix."""
    if not shape.tie_embeddings or config.ensure_weight_tying:
        return shape
    untied = shape.replace(tie_embeddings=False)
    ends = [_module(tensor) for tensor in tensor_table(untied) if tensor.name in ("token_embedding", "output_proj")]
    return untied if any(config.is_saved(module) or config.is_target(module, False) for module in ends) else shape


def _linears(shape: TrainableModelConfig, made: Sequence[Layer]) -> list[tuple[Linear, list[Tensor]]]:
    """Return the linear layers that may have adapters, and the matrices of each."""
    of_model = {tensor.name: tensor for tensor in tensor_table(shape)}
    return [
        (linear, [of_model[layer.at + projection.name] for projection in linear.projections])
        for layer in made
        for linear in layer.linears
    ]


def linear_targets(
    shape: TrainableModelConfig, made: Sequence[Layer], config: LoraConfig
) -> list[tuple[Linear, list[Target]]]:
    """Return the linear layers, and of each the parts with adapters."""
    found, stream = [], 0
    for linear, tensors in _linears(shape, made):
        chosen = []
        for index, tensor in enumerate(tensors):
            module = _module(tensor)
            if config.is_target(module):
                chosen.append(Target(index, tensor, stream + index, module, *_sizes(config, module)))
        stream += len(tensors)
        found.append((linear, chosen))
    return found


def router_targets(
    shape: TrainableModelConfig, made: Sequence[Layer], config: LoraConfig
) -> list[tuple[Linear, list[Target]]]:
    """Return the linear layers of routers with adapters, and the target of each."""
    return [
        (each.layer.router, [Target(0, each.tensors[0], 0, each.name, *_sizes(config, each.name), Kind.ROUTER)])
        for each in expert_parameters(shape, made)
        if each.is_router and config.is_target_parameter(each.name)
    ]


def expert_targets(
    shape: TrainableModelConfig, made: Sequence[Layer], config: LoraConfig
) -> list[tuple[Experts, list[Target]]]:
    """Return the layers of experts, and of each the stacks with adapters.

    PEFT puts one adapter into the other, in the order of the parameters: the last is outermost.
    """
    found: dict[str, tuple[Experts, list[Target]]] = {}
    for each in expert_parameters(shape, made):
        if each.is_router or not config.is_target_parameter(each.name):
            continue
        at, tensor = each.layer.at, each.tensors[0]
        experts, outer, inner = tensor.shape
        last = each.name.rpartition(".")[2].removesuffix("_proj")
        stack = replace(
            tensor, name=f"{at}experts_{last}", shape=(experts, outer * len(each.matrices), inner),
            gguf_name=tensor.gguf_name.replace("_gate_", f"_{last}_"),
        )  # fmt: skip
        target = Target(0, stack, 0, each.name, *_sizes(config, each.name), Kind.EXPERTS, each.matrices)
        _, before = found.setdefault(at, (each.layer, []))
        before[:] = [*(replace(other, inside=True) for other in before), target]
    return list(found.values())


def _sizes(config: LoraConfig, module: str) -> tuple[int, float]:
    """Return rank and factor of an adapter."""
    return config.rank_of(module), config.scaling_of(module)


def _end_tensors(shape: TrainableModelConfig) -> tuple[tuple[Tensor, Kind], ...]:
    """Return the tables of the embedding and the head's matrix, which may be the same."""
    kinds = {Embedding.name: Kind.TABLE, Embedding.positions: Kind.TABLE, "output_proj": Kind.HEAD}
    table = tensor_table(shape.replace(tie_embeddings=False))
    return tuple((tensor, kinds[tensor.name]) for tensor in table if tensor.name in kinds)


def end_targets(shape: TrainableModelConfig, config: LoraConfig) -> list[Target]:
    """Return which of the two ends get adapters; all-linear means neither."""
    stream = sum(len(tensors) for _, tensors in _linears(shape, layers(shape)))
    found = []
    for tensor, kind in _end_tensors(shape):
        module = _module(tensor)
        if config.is_target(module, linear=False):
            found.append(Target(0, tensor, stream, module, *_sizes(config, module), kind))
    return found


def chosen_targets(shape: TrainableModelConfig, config: LoraConfig) -> list[Target]:
    """Return what gets adapters."""
    made = layers(shape)
    each = *linear_targets(shape, made, config), *router_targets(shape, made, config)
    inside = [*(targets for _, targets in each), *(targets for _, targets in expert_targets(shape, made, config))]
    return [*(target for targets in inside for target in targets), *end_targets(shape, config)]


def copies(shape: TrainableModelConfig, config: LoraConfig) -> list[Tensor]:
    """Return the tensors of the model that are trained whole: of saved modules, and biases."""
    adapted = {target.module for target in chosen_targets(shape, config)}
    tied = shape.tie_embeddings and config.ensure_weight_tying  # then the head's names mean the embedding
    untied = shape.replace(tie_embeddings=False) if tied else trained_shape(shape, config)
    head = {"output_proj": "token_embedding"} if tied else {}

    def is_trained(tensor: Tensor) -> bool:
        module = _module(tensor)
        is_bias = tensor.hf_names[-1].name.endswith(".bias")
        biased = is_bias and (config.bias == "all" or (config.bias == "lora_only" and module in adapted))
        return biased or config.is_saved(module)

    wanted = {head.get(tensor.name, tensor.name) for tensor in tensor_table(untied) if is_trained(tensor)}
    return [tensor for tensor in tensor_table(trained_shape(shape, config)) if tensor.name in wanted]


def named(shape: TrainableModelConfig, config: AnyLora) -> AnyLora:
    """Return the configuration with the targets that this model has, in the order of its layers.

    Experts and routers that target modules mean are target parameters in it.  ConfigError for a name that means nothing
    of the model.
    """
    config = as_parameters(config, expert_parameters(shape, layers(shape)), candidates(shape))
    chosen, modules, linear = chosen_targets(shape, config), _modules(shape), candidates(shape)
    every = either(list(dict.fromkeys(module.rpartition(".")[2] for module in linear)))
    for block in config.layers_to_transform or ():
        if block >= shape.num_layers:
            rule = f"this model has blocks 0 to {shape.num_layers - 1}"
            raise ConfigError(f"layers_to_transform ({block}): there is no such block; {rule}")
    for name in config.target_modules or ():
        if _left_out(config, name, linear):
            rule = "exclude_modules, layers_to_transform or modules_to_save leaves out all that it means"
            raise ConfigError(f"target_modules ({shown(name)}): {rule}; leave out the one or the other")
        if not any(map(LoraConfig(target_modules=(name,)).is_target, linear)):
            wrong = "fits no projection of this model" if is_expression(name) else "this model has no such projection"
            raise ConfigError(f"target_modules ({shown(name)}): {wrong}; try {every}")
    _check_names(shape, config, linear, modules)
    if not chosen:
        rule = "leave out exclude_modules, layers_to_transform or modules_to_save"
        raise ConfigError(f"no projection is left that gets an adapter; {rule}")
    modular = [target.module for target in chosen if target.kind not in (Kind.EXPERTS, Kind.ROUTER)]
    names = tuple(dict.fromkeys(module.rpartition(".")[2] for module in modular))
    # The last words, unless they mean more than what was asked for.
    short = config.replace(target_modules=names or None)
    same = [target.module for target in chosen_targets(shape, short)] == [target.module for target in chosen]
    return short if same else config


def candidates(shape: TrainableModelConfig) -> list[str]:
    """Return all modules that may get an adapter."""
    linear = [_module(tensor) for _, tensors in _linears(shape, layers(shape)) for tensor in tensors]
    return [*linear, *(_module(tensor) for tensor, _ in _end_tensors(shape))]


def _left_out(config: LoraConfig, name: str, linear: Sequence[str]) -> bool:
    """Say whether a target means modules, and another setting leaves all of them out."""
    meant = list(filter(LoraConfig(target_modules=(name,)).is_target, linear))
    return bool(meant) and not any(map(config.replace(target_modules=(name,)).is_target, meant))


def _modules(shape: TrainableModelConfig) -> list[str]:
    """Return all modules with weights, and those that they are inside of; a tied head among them."""
    untied = shape.replace(tie_embeddings=False)
    found: dict[str, None] = {}
    for tensor in tensor_table(untied):
        parts = _module(tensor).split(".")
        found |= dict.fromkeys(".".join(parts[: i + 1]) for i in range(len(parts)))
    return list(found)


def unused(shape: TrainableModelConfig, config: LoraConfig, linear: Sequence[str]) -> dict[str, list[str]]:
    """Return the names of the settings that leave out or vary targets, without those that mean something."""
    adapted = [target.module for target in chosen_targets(shape, config)]
    former = [name for each in expert_parameters(shape, layers(shape)) for name in each.names()]
    excluded = [
        name
        for name in config.exclude_modules or ()
        if all(map(LoraConfig(exclude_modules=(name,)).is_target, [*linear, *former]))
    ]
    fields = {"layers_pattern": linear, "rank_pattern": adapted, "alpha_pattern": adapted}
    return {"exclude_modules": excluded, **{field: config.unused(field, among) for field, among in fields.items()}}


def without_unused(shape: TrainableModelConfig, config: LoraConfig) -> LoraConfig:
    """Return the configuration without what has no effect, and PEFT lets pass: names that leave out or vary nothing.

    So are targets that another setting leaves out: of all-linear, PEFT writes every module that it meant; and dropout
    where no adapter has any.
    """
    linear = candidates(shape)
    idle = [name for name in config.target_modules or () if _left_out(config, name, linear)]
    idle = [] if len(idle) == len(config.target_modules or ()) else idle
    names = unused(shape, config, linear)
    if len(names["layers_pattern"]) == len(config.layers_pattern or ()):
        names["layers_pattern"] = []  # without any, the blocks of every list would be meant
    found = config.replace(**config.without(target_modules=idle, **names))
    found = found.replace(dropout=0.0) if _has_tables_alone(shape, found) else found
    return found if _biases(shape, found) else found.replace(bias="none")


def _has_tables_alone(shape: TrainableModelConfig, config: LoraConfig) -> bool:
    """Say whether nothing but tables of the embedding gets adapters: these have no dropout."""
    return {target.kind for target in chosen_targets(shape, config)} == {Kind.TABLE}


def _biases(shape: TrainableModelConfig, config: LoraConfig) -> list[Tensor]:
    """Return the biases that are trained because `bias` says so."""
    return copies(shape, config.replace(modules_to_save=None, ensure_weight_tying=False))


def _check_names(
    shape: TrainableModelConfig, config: LoraConfig, linear: Sequence[str], modules: Sequence[str]
) -> None:
    """Raise ConfigError for a name, other than a target module, that means nothing of this model."""
    _check_parameters(shape, config)
    for field, names in unused(shape, config, linear).items():
        for name in names:
            raise ConfigError(f"{field} ({shown(name)}): {IDLE[field]}")
    if config.dropout and _has_tables_alone(shape, config):
        rule = "only embeddings get adapters, whose rows are looked up, and nothing of them is dropped"
        raise ConfigError(f"dropout ({config.dropout}): {rule}; leave it out")
    for name in config.modules_to_save or ():
        if not any(module.endswith(name) for module in modules):
            tops = [_module(tensor) for tensor in tensor_table(shape) if "layers." not in tensor.name]
            some = either(list(dict.fromkeys([*(module.rpartition(".")[2] for module in tops), "lm_head"])))
            raise ConfigError(f"modules_to_save ({shown(name)}): this model has no such module; try {some}")
    if config.bias != "none" and not _biases(shape, config):
        which = "the modules with adapters have none" if config.bias == "lora_only" else "this model has none"
        raise ConfigError(f"bias ({config.bias}): no bias would be trained, {which}; leave it out")
    if config.ensure_weight_tying:
        saved = [entry.name for entry in copies(shape, config)]
        ends = [target.module for target in end_targets(shape, config) if target.tensor.name != Embedding.positions]
        if ends:
            rule = "one adapter for embedding and head is not computed"
            raise ConfigError(f"ensure_weight_tying (true) beside {ends[0]} in target_modules: {rule}; leave out one")
        if not shape.tie_embeddings or "token_embedding" not in saved:
            rule = "embedding and head are one matrix, and modules_to_save names one of them"
            raise ConfigError(f"ensure_weight_tying (true) acts only where {rule}; leave it out")


def _check_parameters(shape: TrainableModelConfig, config: LoraConfig) -> None:
    """Raise ConfigError for a target parameter that is no router and no stack of experts, or is trained whole."""
    stacks = [each.name for each in expert_parameters(shape, layers(shape))]
    for name in config.target_parameters or ():
        meant = [stack for stack in stacks if LoraConfig(target_parameters=(name,)).is_target_parameter(stack)]
        if not meant:
            rule = "this model has no such matrices of experts or routers"
            ends = dict.fromkeys(".".join(stack.split(".")[-3:]) for stack in stacks)
            remedy = f"try {either(list(ends))}" if ends else "it has no experts; name modules in target_modules"
            raise ConfigError(f"target_parameters ({shown(name)}): {rule}; {remedy}")
        if whole := [stack for stack in meant if config.is_saved(stack)]:
            raise ConfigError(f"target_parameters ({shown(name)}): modules_to_save trains {whole[0]}; leave out one")


# -- their tensors ----------------------------------------------------------------------------------


def trained_table(shape: TrainableModelConfig, config: LoraConfig) -> tuple[Tensor, ...]:
    """Return all that is trained in flat order: each linear layer's As, Bs, and DoRA's lengths; ends; copies."""
    table: list[Tensor] = []
    offset = 0
    adapted = set()
    made = layers(shape)
    each = *linear_targets(shape, made, config), *router_targets(shape, made, config)
    together = [targets for _, targets in each]
    stacks = [[target] for _, some in expert_targets(shape, made, config) for target in some]
    for targets in (*together, *stacks, *([target] for target in end_targets(shape, config))):
        adapted |= {target.module for target in targets}
        for kind in PARTS if config.use_dora else PARTS[:2]:
            for target in targets:
                form, sizes = target.parts()[kind]
                names = (form,), f"{target.tensor.gguf_name}.lora_{kind}"
                by_ids = target.kind is Kind.TABLE and kind == "a"  # its rows are chosen as the table's are
                name = f"{target.tensor.name}.{kind}"
                table.append(Tensor(name, *names, sizes, offset, decay=kind != "m", embedding=by_ids))
                offset += table[-1].size
    for tensor in copies(shape, config):
        form = tensor.hf_names[-1]
        module, _, end = form.name.rpartition(".")
        inside = ".base_layer" if module in adapted else ""  # where PEFT keeps the bias of what has an adapter
        names_of_copy = (replace(form, name=f"{PREFIX}{module}{inside}.{end}"),)
        table.append(replace(tensor, hf_names=names_of_copy, offset=offset))
        offset += tensor.size
    return tuple(table)


def _is_adapter(entry: Tensor) -> bool:
    return entry.name.endswith((".a", ".b", ".m"))
