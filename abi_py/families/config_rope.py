"""RoPE in config.json: its base and its scaling, under the keys of transformers 4 and 5.

Where two entries speak of one thing, transformers' choice holds (measured with 5.24), or an error names both:

    rope_scaling, if it says anything, hides rope_parameters; the rope_theta inside hides the one beside them
    rope_type hides type
    original_max_position_embeddings beside them hides the one inside
    YaRN's factor follows from the two lengths where it is null, and must not be missing
"""

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError, ConfigError, shown
from ..fields import either
from ..rope_scaling import RopeScaling, RopeType, read_rope_scaling
from ..shape import ModelShape
from .config_json import refuse_others

__all__ = ["rope_fields", "write_rope"]

# The DeepZig folder writes it under three names; transformers knows the first.
THETA = ("rope_theta", "rope_base", "qk_rope_base")
KINDS = ("default", *(kind.value for kind in RopeType))
ORIGINAL = "original_max_position_embeddings"
MAX_LENGTH = 1 << 31  # positions are 32-bit
LLAMA3 = ("low_freq_factor", "high_freq_factor")  # what transformers has no defaults for


def rope_fields(content: Mapping[str, Any], place: str, part: str = "") -> dict[str, Any]:
    """Return the fields `rope_theta` and `rope_scaling`, and `max_seq_len` where the scaling decides it.

    part    the entry of the table that is meant, where it has one for each kind of layer
    With `dynamic`, max_position_embeddings is the longest row of training, and rows of factor times that are read.
    CheckpointError for any other RoPE.
    """
    table = next((name for name in ("rope_scaling", "rope_parameters") if content.get(name)), "")
    rope = content[table] if table else {}
    if part and isinstance(rope, Mapping) and part in rope:
        table, rope = f"{table}.{part}", rope[part]
    if not isinstance(rope, Mapping):
        raise CheckpointError(f"{place}: {table} is {shown(rope)}, but must be an object; it is damaged")
    given = read_rope_scaling(rope)
    rope = {name: value for name, value in given.items() if value is not None}
    whole, share = f"{table}.partial_rotary_factor", rope.pop("partial_rotary_factor", 1)
    refuse_others({whole: share}, {whole: (1,)}, place)
    fields = {"rope_theta": rope.pop("rope_theta") if "rope_theta" in rope else _theta(content, place)}
    kind = rope.get("rope_type", "default")
    if kind not in KINDS:
        raise CheckpointError(f"{place}: {table}.rope_type is {shown(kind)}; this version computes {either([*KINDS])}")
    if kind == "default":
        others = {f"{table}.{name}": value for name, value in rope.items() if name != "rope_type"}
        refuse_others(others, dict.fromkeys(others, ()), place)
        return {**fields, "rope_scaling": None}
    longest = content["max_position_embeddings"]
    if kind in (RopeType.YARN, RopeType.LLAMA3):
        original = content.get(ORIGINAL) or rope.get(ORIGINAL)
        rope |= {} if original is None else {ORIGINAL: original}
        if kind == RopeType.YARN and "factor" in given and given["factor"] is None and original:
            rope["factor"] = _length(longest, "max_position_embeddings", place) / _length(original, ORIGINAL, place)
    missing = [name for name in ("factor", *LLAMA3) if name not in rope and (name == "factor" or kind == "llama3")]
    if missing:
        raise CheckpointError(f"{place}: {table} lacks {', '.join(missing)}; rope_type {kind} needs it")
    try:
        scaling = RopeScaling.from_dict(rope)
    except ConfigError as error:
        raise CheckpointError(f"{place}: {table}: {error}") from None
    if kind == RopeType.DYNAMIC:
        scaled = _length(longest, "max_position_embeddings", place) * scaling.factor
        if scaled >= MAX_LENGTH:
            raise CheckpointError(
                f"{place}: {table}.factor is {scaling.factor:g}, which makes rows too long; it is damaged"
            )
        fields["max_seq_len"] = int(scaled)
    return {**fields, "rope_scaling": scaling}


def _length(value: Any, name: str, place: str) -> int:
    """Return a length that the scaling is computed with; CheckpointError if it is none."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < MAX_LENGTH:
        return value
    raise CheckpointError(f"{place}: {name} is {shown(value)}, but must be a whole number from 1 on; it is damaged")


def _theta(content: Mapping[str, Any], place: str) -> Any:
    """Return the base that is written beside the table; 10000 if there is none."""
    names = THETA if content["model_type"] == "deepzig_conversational" else THETA[:1]
    given = {name: content[name] for name in names if name in content}
    values = list(given.values())
    if any(value != values[0] for value in values):
        said = " and ".join(f"{name} ({shown(value)})" for name, value in given.items())
        raise CheckpointError(f"{place}: {said} must be equal, because they are one thing; remove those that are wrong")
    return values[0] if values else 10000.0


def write_rope(shape: ModelShape) -> dict[str, Any]:
    """Return the entries of RoPE, and of the longest row; both versions of transformers read them."""
    scaling = shape.rope_scaling
    if scaling is None:
        return {"max_position_embeddings": shape.max_seq_len, "rope_theta": shape.rope_theta}
    dynamic = scaling.rope_type is RopeType.DYNAMIC
    longest = scaling.unscaled_length(shape.max_seq_len) if dynamic else shape.max_seq_len
    written = scaling.said()
    if scaling.rope_type is RopeType.LLAMA3:
        written |= {name: getattr(scaling, name) for name in LLAMA3}
    return {"max_position_embeddings": longest, "rope_theta": shape.rope_theta, "rope_scaling": written}
