"""A call with arrays that do not fit is an error that says so: no garbage, no NaN, no write past the end."""

import importlib
import inspect
import pkgutil

import numpy as np
import pytest

import abi_py.kernels
from abi_py.kernels import unchecked as trusted
from abi_py.kernels.engine.checks import checked, unchecked
from abi_py.kernels.engine.jit import JIT
from abi_py.kernels.storage import STORAGES

SIZES = {
    **{"N": 6, "C": 8, "V": 7, "F": 5, "P": 20, "n": 6, "R": 6, "W": 16, "D": 4, "T": 3, "S": 2, "H": 4, "G": 2},
    **{"group": 2, "A": 5, "K": 8, "B": 8, "L": 6, "M": 5, "floats": 90, "items": 8},
}
ROUTED = {"K": 2, "E": 5, "ends": 6, "M": 6}
GATED = {"W": 10, "parts": 2}
OF = {  # sizes that differ from those
    **{"sgd_": {"n": 1, "M": 20}, "adam_": {"n": 1}, "adamw_": {"n": 1}},
    **{"route_forward": ROUTED, "route_backward": ROUTED},
    **dict.fromkeys(("gelu_forward", "gelu_forward_rounded", "gelu_backward"), GATED),
    "to_experts": {"E": 2, "ends": 3, "out": 3, "in": 8, "columns": 6},
    "from_experts": {"E": 2, "ends": 3, "out": 8, "in": 4, "columns": 8},
    "expert_gradients": {"E": 2, "ends": 3, "out": 3, "in": 5, "A": 2, "B": 6, "D": 6},
}
NUMBERS = {
    **{"eps": 1e-5, "accumulate": False, "heads": 4, "kv_heads": 2, "batch": 2, "rate": 0.5, "seed": 1, "first": 0},
    **{"smoothing": 0.1, "scale": 1.0, "backward": True, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "step": 1},
    **{"z_loss": 0.1, "ratio": 1.0, "steps": 5, "exact": False},
    **{"nesterov": False, "beta1": 0.9, "beta2": 0.99, "storage": STORAGES["float32"]},
    **{"raws": (np.ones((5, 8), np.float32),), "storages": (STORAGES["float32"],)},
}
LARGEST = {  # they reach to the last place
    **{"ids": "V", "labels": "V", "positions": "T", "slots": "S", "rows": "N", "token": "N", "chosen": "E"},
}
FREE = {("cross_entropy", "z", 0), ("bias_forward", "y", 0)}  # outputs that may be smaller: fewer rows
NO_ARRAYS_TO_CHECK = {"rope_table", "muon_ratio", "muon_flops", "starts_within", "load_balancing", "z_loss"}
NO_ARRAYS_TO_CHECK |= {"rope_angles", "rope_frequencies", "parameter_chunks", "chunk_rows", "scratch_floats"}
NO_ARRAYS_TO_CHECK |= {"block_chunks", "blocks_of", "strips", "Lengths", "Second", "streamed_products"}
NO_ARRAYS_TO_CHECK |= {"forward_plan", "backward_plan", "Parts", "panels", "grid", "parts_of_keys"}
OWN_CHECKS = {"matmul"}


def operations():
    """Return every public function of the operations' files that Python calls, by name."""
    found = {}
    for stem in trusted.MODULES:
        module = importlib.import_module(f"abi_py.kernels.{stem}")
        for name, value in vars(module).items():
            if callable(value) and getattr(value, "__module__", "") == module.__name__ and not name.startswith("_"):
                found[name] = value
    return found


CHECKED = {name: function for name, function in operations().items() if hasattr(function, "unchecked")}


def arguments_of(name):
    """Return arguments that fit."""
    function, made = CHECKED[name], {}
    sizes = SIZES | NUMBERS | OF.get(name, {})
    for array in function.signature.arrays:
        dtype, shape = array.types[0], tuple(size.value(sizes) for size in array.sizes)
        top = sizes[LARGEST[array.name]] - 1 if array.name in LARGEST else 0
        made[array.name] = np.full(shape, top if dtype.kind == "i" else 1, dtype)
        if array.name == "chunks":
            made["chunks"][:] = (0, sizes["P"], 0)[: shape[1]]
        if array.name == "rows":
            made["rows"][:] = np.arange(sizes["N"])
        if array.name == "offsets" and not array.written:
            made["offsets"][:] = 0, 1, 2
        if (name, array.name) == ("cache_append", "positions"):  # no two rows at one place
            made["slots"][:], made["positions"][:] = np.divmod(np.arange(6), 3)
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name not in made and parameter.default is parameter.empty:
            made[parameter.name] = NUMBERS[parameter.name]
    return made


def wrong_arguments(name):
    """Yield what is wrong and the arguments, one array at a time."""
    for array in CHECKED[name].signature.arrays:
        right = arguments_of(name)
        x = right[array.name]

        def such(what, instead, right=right, array=array):
            return f"{array.name} {what}", right | {array.name: instead}

        other = np.float32 if x.dtype == np.float64 else np.float64
        yield such(np.dtype(other).name, x.astype(other))
        if x.dtype.kind == "f":
            yield such("int64", x.astype(np.int64))
        yield such("a list", x.tolist())
        yield such("of other byte order", x.astype(x.dtype.newbyteorder())) if x.itemsize > 1 else such("None", 3)
        yield such("with an axis more", x[None])
        if x.shape[-1] > 1:
            spread = np.repeat(x, 2, axis=-1)[..., ::2]
            assert spread.shape == x.shape
            yield such("every other number", spread)
        if array.written:
            fixed = x.copy()
            fixed.flags.writeable = False
            yield such("read-only", fixed)
            for axis in range(x.ndim):
                if (name, array.name, axis) not in FREE:
                    small = np.ascontiguousarray(np.delete(x, -1, axis))
                    yield such(f"too small along axis {axis}", small)
        elif array.below or array.name == "labels":
            for value in (np.iinfo(np.int32).max, *([-1] if array.below else [])):
                outside = x.copy()
                outside.flat[-1] = value
                yield such(f"with {value}", outside)


def test_every_operation_is_checked():
    assert {*operations()} == {name for name in operations() if name.endswith("_ref")} | {*CHECKED} | {
        *NO_ARRAYS_TO_CHECK,
        *OWN_CHECKS,
    }
    assert len(CHECKED) == 54
    for module in pkgutil.walk_packages(abi_py.kernels.__path__, "abi_py.kernels."):  # Python calls nothing else
        for name, value in vars(importlib.import_module(module.name)).items():
            if getattr(value, "targetoptions", {}).get("parallel"):
                assert name.startswith("_"), f"{module.name}.{name} is public and not checked"


@pytest.mark.parametrize("name", sorted(CHECKED))
def test_what_fits_is_computed(name):
    CHECKED[name](**arguments_of(name))


def refusal(function, arguments):
    """Return the message of the TypeError or ValueError; nothing if there is none."""
    try:
        function(**arguments)
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", sorted(CHECKED))
def test_what_does_not_fit_is_refused(name):
    for what, arguments in wrong_arguments(name):
        message = refusal(CHECKED[name], arguments)
        assert message, f"{name} takes {what}"
        # Too small an output may look like too large an input.
        blamed = {*inspect.signature(CHECKED[name]).parameters, "W"}
        assert message.replace("[", " ").split()[0] in blamed, message
        assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("rms_norm_forward", {"x": np.ones((6, 8))}, "x is float64; .* takes float32 arrays; use x.astype"),
        ("rms_norm_forward", {"y": np.ones((6, 8))}, "y is float64; .*; make it with dtype np.float32"),
        ("rms_norm_forward", {"x": [[1.0]]}, r"x is list; .*; use np.asarray\(x, np.float32\)"),
        ("rms_norm_forward", {"r": np.ones(5, np.float32)}, r"r has shape \(5,\); .* takes \(N H\), here \(24\)"),
        ("rms_norm_forward", {"eps": "1e-5"}, "eps is str; rms_norm_forward takes a number"),
        ("rope_forward", {"heads": 7}, r"W \(16\) must be at least heads D \(28\) in rope_forward"),
        ("embedding_forward", {"ids": np.int32([0, 1, 7, 0, 0, 0])}, r"ids\[2\] is 7; .* 0 ... 6 \(V - 1, V = 7\)"),
        ("attention_forward", {"heads": 3}, r"has shape|must be"),
        ("attention_forward", {"batch": 4}, r"N \(6\) must be batch T with batch = 4"),
        ("attention_forward", {"batch": 0}, r"batch \(0\) must be a whole number from 1 on"),
        ("attention_forward", {"k": np.ones((6, 8), np.uint16)}, "q is float32, k uint16 and v float32; .* one type"),
        ("attention_forward", {"starts": np.int32([0, 2, 0, 0, 0, 0])}, r"starts\[1\] is 2; query 1 is at 1"),
        ("dropout_forward", {"rate": 1.0}, r"rate \(1.0\) must be at least 0 and below 1"),
        ("head_loss", {"scratch": np.ones(89, np.float32)}, "scratch has 89 floats; the head needs 90"),
        ("head_loss", {"smoothing": 1.0}, r"smoothing \(1.0\) must be at least 0 and below 1"),
        ("head_loss_backward", {"z_loss": -1.0}, r"z_loss \(-1.0\) must be zero or more"),
        ("adamw_", {"chunks": np.int64([[0, 21]])}, "chunks must be ranges inside 0 ... 20"),
        ("adamw_", {"step": 0}, r"step \(0\) must be 1 at the first update"),
        ("sgd_", {"m": np.zeros(0, np.float32)}, r"m has shape \(0,\); sgd_ with momentum takes \(20,\)"),
        ("product", {"transpose_a": True}, "a sums over 5 elements and b over 8"),
        ("cross_entropy", {"first": 1}, "z has 6 rows of logits; cross_entropy takes one for each of rows"),
    ],
)
def test_the_message_says_what_and_how(name, changed, message):
    with pytest.raises((TypeError, ValueError), match=message):
        CHECKED[name](**arguments_of(name) | changed)


def test_frozen_weights_have_no_gradient():
    arguments = arguments_of("head_loss_backward")
    CHECKED["head_loss_backward"](**arguments | {"dw": None})
    with pytest.raises(TypeError, match="dx is NoneType"):
        CHECKED["head_loss_backward"](**arguments | {"dx": None})


def test_the_docstring_says_what_is_taken():
    assert "Takes y! x (N, H C); r! (N H); w (C)" in CHECKED["rms_norm_forward"].__doc__


def test_the_model_takes_them_without_their_checks():
    from abi_py.model.layers import norm

    assert norm.rms_norm_forward is CHECKED["rms_norm_forward"].unchecked
    assert trusted.product is unchecked(CHECKED["product"])
    assert trusted.product_ref is operations()["product_ref"]
    with pytest.raises(AttributeError, match="has no operation rms_norm"):
        _ = trusted.rms_norm


@pytest.mark.skipif(not JIT, reason="nothing is compiled")
@pytest.mark.parametrize("name", ["global_norm", "rms_norm_forward", "rms_norm_backward", "cross_entropy"])
def test_vectors_of_another_type_are_refused_while_a_kernel_is_compiled(name):
    arguments = {
        key: value.astype(np.float64) if isinstance(value, np.ndarray) and value.dtype == np.float32 else value
        for key, value in arguments_of(name).items()
    }
    with pytest.raises(TypeError, match="is given an array of float64; kernels compute in float32"):
        CHECKED[name].unchecked(**arguments)


def test_a_signature_that_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match=r"<lambda>: .x N. is no entry of a signature"):
        checked("x N")(lambda x: x)
    with pytest.raises(ValueError, match="has no argument y"):
        checked("y (N)")(lambda x: x)
