# ruff: noqa: RUF009 (a call of `opt` declares a field, it is not a shared default)
"""Adapters as they are asked for: which modules get one, its rank and scale, and what is trained whole beside them.

Modules are those of the Transformers library, by full name (`model.layers.0.self_attn.q_proj`).  The rules by which a
setting means a module are PEFT's, so that a folder means the same in both:

    target_modules    a name means the module of this name and those that end in it, from a dot on; one regular
                      expression must fit the full name
    exclude_modules   the same, and beats it
    target_parameters a name means stacked matrices of experts: those of this name, and those that end in it, from a
                      dot on; then modules get adapters only where target_modules names them
    layers_to_transform, layers_pattern    of the modules that are so meant, those in these blocks
    rank_pattern, alpha_pattern    NAME=VALUE: NAME is a regular expression for the end of the full name, from a dot on;
                      the first that fits counts
    modules_to_save   a name means the modules that end in it, and all that is inside them

Source: PEFT 0.21, `check_target_module_exists`, `_inject_parameters`, `get_pattern_key` and `_set_trainable`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError, shown
from .fields import ON, Accepts, Config, opt
from .untrusted import MAX_INT

__all__ = ["ALL_LINEAR", "SHORT", "LoraConfig", "is_expression"]

SHORT = ("q", "k", "v", "o", "gate", "up", "down")  # the ABI's names, of q_proj and its like
ALL_LINEAR = "all-linear"
BIASES = ("none", "all", "lora_only")
SPECIAL = re.compile(r"[*+?()\[\]{}|\\^$]")  # what no name of a module has


def is_expression(name: str) -> bool:
    """Say whether a name is a regular expression."""
    return SPECIAL.search(name) is not None


def _full(word: Any) -> Any:
    """Return a projection by its full name; what is no text, `convert` refuses."""
    word = word.strip() if isinstance(word, str) else word
    return f"{word}_proj" if word in SHORT else word


def _parts(value: Any) -> list[Any]:
    """Return the words of a list, or of text with commas; a regular expression may have commas of its own."""
    words = value if isinstance(value, list | tuple | set) else (value,)
    return [
        part
        for word in words
        for part in (word.split(",") if isinstance(word, str) and not is_expression(word) else (word,))
    ]


def _names(value: Any) -> Any:
    """Return modules by their names: also the ABI's `q`, or a mapping of names to true and false, as in Zig."""
    if isinstance(value, Mapping):
        value = [name for name, chosen in value.items() if chosen]
    return tuple(map(_full, _parts(value)))


def _pattern(value: Any) -> Any:
    """Return NAME=VALUE of a mapping, or of such texts."""
    if isinstance(value, Mapping):
        value = [f"{name}={number}" for name, number in value.items()]
    pairs = [word.rpartition("=") if isinstance(word, str) and "=" in word else word for word in _parts(value)]
    return tuple(f"{_full(pair[0])}={pair[2].strip()}" if isinstance(pair, tuple) else pair for pair in pairs)


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Config):
    """Low-rank adapters on a frozen model (LoRA); the defaults of rank, alpha and dropout are the ABI's."""

    rank: int = opt(8, "inner width of an adapter", flag="lora-rank", common=True)
    alpha: float = opt(16.0, "the adapters' output is multiplied by alpha / rank", flag="lora-alpha")
    dropout: float = opt(0.0, "share of an adapter's input that is dropped in training", flag="lora-dropout")
    target_modules: Accepts[tuple[str, ...] | None, Sequence[str] | str] = opt(
        None,
        "modules that get an adapter, all-linear (every linear one but the head; experts and their routers too) if not "
        "given: ends of their names in the Transformers library, as in q_proj or attn.c_proj; also q, k, v, o, gate, "
        "up, down; several with commas, or the flag again; or one regular expression for the whole name",
        flag="lora-targets",
        read=_names,
    )
    target_parameters: Accepts[tuple[str, ...] | None, Sequence[str] | str] = opt(
        None,
        "stacked matrices of experts that get an adapter for each expert, and matrices of routers: ends of their names "
        "in the Transformers library, as in mlp.experts.gate_up_proj, experts.down_proj or mlp.gate.weight; then "
        "modules get one only where --lora-targets names them; several with commas, or the flag again",
        flag="lora-target-parameters",
        read=lambda value: tuple(_parts(value)),
    )
    exclude_modules: Accepts[tuple[str, ...] | None, Sequence[str] | str] = opt(
        None, "modules that get none all the same, named as in --lora-targets", flag="lora-exclude", read=_names
    )
    layers_to_transform: Accepts[tuple[int, ...] | None, Sequence[int] | int] = opt(
        None,
        "blocks whose modules get adapters, from 0, all if not given; several with commas, or the flag again",
        flag="lora-layers",
        read=lambda value: tuple(_parts(value)),
    )
    layers_pattern: Accepts[tuple[str, ...] | None, Sequence[str] | str] = opt(
        None,
        "what stands before the number of a block in the names of its modules, where a model has several such lists",
        flag="lora-layers-pattern",
        read=lambda value: tuple(_parts(value)),
        acts={"layers_to_transform": ON},
    )
    rank_pattern: Accepts[tuple[str, ...] | None, Mapping[str, int] | Sequence[str] | str] = opt(
        None,
        "ranks of some modules, as in q_proj=16: a regular expression for the end of a name, the first that fits "
        "counts; several with commas, or the flag again",
        flag="lora-rank-pattern",
        read=_pattern,
    )
    alpha_pattern: Accepts[tuple[str, ...] | None, Mapping[str, float] | Sequence[str] | str] = opt(
        None, "alphas of some modules, as in q_proj=32", flag="lora-alpha-pattern", read=_pattern
    )
    bias: str = opt(
        "none",
        "biases that are trained too: none, those of the modules with adapters (lora_only), or all that the model has",
        flag="lora-bias",
    )
    modules_to_save: Accepts[tuple[str, ...] | None, Sequence[str] | str] = opt(
        None,
        "modules of which all weights are trained, and saved beside the adapters: ends of their names, as in "
        "embed_tokens, lm_head or norm; several with commas, or the flag again",
        flag="lora-modules-to-save",
        read=lambda value: tuple(_parts(value)),
    )
    ensure_weight_tying: bool = opt(
        False,
        "where embedding and head are one matrix, train one copy of it for both; without it, each that "
        "--lora-modules-to-save names has a copy of its own",
        flag="lora-tie",
        acts={"modules_to_save": ON},
    )
    use_rslora: bool = opt(False, "multiply by alpha / sqrt(rank) instead", flag="rslora")
    use_dora: bool = opt(
        False, "train the lengths of the adapted matrices' rows too, apart from their directions: DoRA", flag="dora"
    )
    seed: int = opt(0, "seed of the adapters and of their dropout", flag="lora-seed")

    def validate(self) -> None:
        """Raise `ConfigError` naming field, value, rule and remedy; which modules a model has, `LoraModel` tells."""
        self._require_at_least(1, "rank")
        self._require_at_least(0, "seed")
        self._require("alpha", math.isfinite(self.alpha) and self.alpha > 0, "be a positive number", "try 2 x rank")
        self._require("dropout", 0 <= self.dropout < 1, "be at least 0 and below 1", "try 0.05")
        self._require("bias", self.bias in BIASES, f"be {BIASES[0]}, {BIASES[1]} or {BIASES[2]}", "choose one")
        if self.target_modules is not None:
            given = bool(self.target_modules)
            self._require("target_modules", given, "name at least one projection", "leave it out for all of them")
            if any(name.lower() == ALL_LINEAR for name in self.target_modules):
                alone = len(self.target_modules) == 1
                self._require("target_modules", alone, f"be {ALL_LINEAR} alone", "leave the others out")
                object.__setattr__(self, "target_modules", (ALL_LINEAR,) if self.target_parameters else None)
        lists = "target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"
        for name in (*lists, "modules_to_save"):
            values = getattr(self, name)
            object.__setattr__(self, name, tuple(dict.fromkeys(values)) if values else None)
        if self.target_parameters:  # PEFT's rules too: it adds to the matrices themselves, which see no inputs
            which = "beside target_parameters"
            self._require("dropout", self.dropout == 0, f"be 0 {which}", "leave one of the two out")
            self._require("use_dora", not self.use_dora, f"be false {which}", "leave one of the two out")
        for name in ("target_modules", "exclude_modules"):
            self._require_names(name)
        if self.target_modules and is_expression(self.target_modules[0]):
            rule = "not stand beside a regular expression in target_modules"
            self._require("layers_to_transform", self.layers_to_transform is None, rule, "put them into it")
        if self.layers_to_transform is not None:
            counted = min(self.layers_to_transform) >= 0
            self._require("layers_to_transform", counted, "be numbers of blocks", "the first is 0")
        for pattern in self.layers_pattern or ():
            self._require_expression("layers_pattern", pattern)
        for name, kind, least in (("rank_pattern", int, 1), ("alpha_pattern", float, 0)):
            pairs = getattr(self, name)
            object.__setattr__(self, name, pairs or None)
            for pair in pairs or ():
                self._require_pair(name, pair, kind, least)
            names = [pair.rpartition("=")[0] for pair in pairs or ()]
            once = len(set(names)) == len(names)  # PEFT's object of them would keep the last, where the first counts
            self._require(name, once, "give each NAME once", "leave out all but one")

    def _require_names(self, name: str) -> None:
        """Raise `ConfigError` for a regular expression beside names, or one that is none."""
        values = getattr(self, name) or ()
        for value in filter(is_expression, values):
            self._require(name, len(values) == 1, "be names, or one regular expression alone", "join them with |")
            self._require_expression(name, value)

    def _require_expression(self, name: str, text: str) -> None:
        try:
            re.compile(text)
        except re.error as error:
            raise ConfigError(f"{name} ({shown(text)}) must be a regular expression; {error}") from None

    def _require_pair(self, name: str, pair: str, kind: type, least: int) -> None:
        expression, _, number = pair.rpartition("=")
        try:
            value = kind(number)
        except ValueError:
            value = -1
        good = expression and value >= least and 0 < value < (MAX_INT if kind is int else math.inf)
        rule = "a whole number of 1 or more" if kind is int else "a positive number"
        self._require(name, bool(good), f"be NAME=VALUE, with {rule}", "write q_proj=16")
        self._require_expression(name, expression)

    # -- what it means ---------------------------------------------------------------------------

    def is_target(self, module: str, linear: bool = True) -> bool:
        """Say whether a module gets an adapter; `linear`: it is one that all-linear means."""
        if self.leaves_out(module):
            return False
        if self.target_modules is None and self.target_parameters is not None:
            return False
        if self.target_modules in (None, (ALL_LINEAR,)):
            return linear and self._is_in_layers(module)
        if not _means(self.target_modules, module):
            return False
        whole = is_expression(self.target_modules[0]) or module in self.target_modules
        return whole or self._is_in_layers(module)

    def leaves_out(self, module: str) -> bool:
        """Say whether a module gets no adapter, whatever is named: it is excluded, or trained whole."""
        if self.exclude_modules and _means(self.exclude_modules, module):
            return True
        return any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.modules_to_save or ())

    def is_target_parameter(self, parameter: str) -> bool:
        """Say whether a router's matrix or a stack of experts', by its full name, gets adapters."""
        return any(f".{parameter}".endswith(f".{name}") for name in self.target_parameters or ())

    def _is_in_layers(self, module: str) -> bool:
        """Say whether a module is in the blocks that are meant."""
        if self.layers_to_transform is None:
            return True
        first = _block(self.layers_pattern, module)
        return first is not None and int(first["block"]) in self.layers_to_transform

    def is_saved(self, module: str) -> bool:
        """Say whether all weights of a module are trained: it, or one that it is inside of, is named."""
        parts = module.split(".")
        inside = (".".join(parts[: i + 1]) for i in range(len(parts)))
        return any(each.endswith(name) for each in inside for name in self.modules_to_save or ())

    def rank_of(self, module: str) -> int:
        """Return the inner width of a module's adapter."""
        found = _first(self.rank_pattern, module)
        return self.rank if found is None else int(found.rpartition("=")[2])

    def alpha_of(self, module: str) -> float:
        """Return the alpha of a module's adapter."""
        found = _first(self.alpha_pattern, module)
        return self.alpha if found is None else float(found.rpartition("=")[2])

    def scaling_of(self, module: str) -> float:
        """Return the factor of the output of a module's adapter."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)

    @property
    def scaling(self) -> float:
        """The factor of the output of an adapter that no pattern means."""
        return self.scaling_of("")

    def tells_apart(self, field: str, module: str, others: Sequence[str]) -> bool:
        """Say whether what counts for a module of rank_pattern or alpha_pattern fits none of the others."""
        found = _first(getattr(self, field), module)
        return found is not None and not any(_first((found,), other) for other in others)

    def unused(self, field: str, modules: Sequence[str]) -> list[str]:
        """Return which NAME=VALUE of rank_pattern or alpha_pattern count for none of these modules, and which of
        layers_pattern stand before the number of a block in none of their names."""
        values = getattr(self, field) or ()
        if field == "layers_pattern":
            return [each for each in values if not any(_block((each,), module) for module in modules)]
        return [pair for pair in values if all(_first(values, module) != pair for module in modules)]

    def without(self, **unused: Sequence[str]) -> dict[str, Any]:
        """Return the values of some fields without those that are `unused`."""
        return {
            name: tuple(value for value in getattr(self, name) or () if value not in values) or None
            for name, values in unused.items()
        }


def _means(names: Sequence[str], module: str) -> bool:
    """Say whether names, or a regular expression, mean a module."""
    if is_expression(names[0]):
        return re.fullmatch(names[0], module) is not None
    return module in names or any(module.endswith(f".{name}") for name in names)


def _block(patterns: Sequence[str] | None, module: str) -> re.Match[str] | None:
    """Return where the number of its block is in the name of a module, after the first of the patterns that fits."""
    each = [rf"(?:^|.*?\.){pattern}" for pattern in patterns or ()] or [r".*?\.[^.]*"]
    found = (re.match(rf"{before}\.(?P<block>\d+)\.", module) for before in each)
    return next(filter(None, found), None)


def _first(pairs: Sequence[str] | None, module: str) -> str | None:
    """Return the first NAME=VALUE that means a module."""
    fits = (pair for pair in pairs or () if re.match(rf"(.*\.)?({pair.rpartition('=')[0]})$", module))
    return next(fits, None)
