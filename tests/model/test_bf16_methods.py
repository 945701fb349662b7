"""How far bfloat16 by one method is from bfloat16 by another, in a step: what docs/4-amx.md states."""

import numpy as np
import pytest
from small_models import make_batch, make_model

from abi_py.kernels.engine.number_formats import BFLOAT16

LOSS, GRADIENT = 1e-5, 2e-3  # relative; of the gradient: length of the difference.  Rounding itself: 5e-3 and more


@pytest.fixture(scope="module")
def steps():
    """Return loss and flat gradient in float32, and in bfloat16 by each method that can be used here."""
    model = make_model(3.0)
    ids, labels = make_batch(np.random.default_rng(5), model)

    def step(precision):
        model.zero_gradients()
        loss = model.compute_loss(ids, labels, backward=True, precision=precision).loss
        return loss, model.parameters.gradients_flat.astype(np.float64)

    found = {"float32": step("fp32")}
    for name, number_format in BFLOAT16.usable.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(vars(BFLOAT16), "method", name)
            patch.setitem(vars(BFLOAT16), "chosen", number_format)
            found[name] = step("bf16")
    return found


def distance(one, other):
    """Return how far the losses and the gradients are apart, relative to the other's."""
    loss, gradient = abs(one[0] - other[0]) / other[0], np.linalg.norm(one[1] - other[1])
    return loss, gradient / np.linalg.norm(other[1])


@pytest.mark.parametrize("name", ["dot", "amx"])
def test_methods_differ_by_less_than_rounding_does(steps, name):
    if name not in steps:
        pytest.skip(f"{name} can't be used here")
    loss, gradient = distance(steps[name], steps["fp32"])
    assert loss < LOSS
    assert 0 < gradient < GRADIENT  # another order of sums: other bits
    assert distance(steps[name], steps["float32"])[1] > 2 * gradient


def test_the_bounds_are_below_what_rounding_does(steps):
    """A method that rounded otherwise, or did not round at all, would not pass."""
    assert distance(steps["fp32"], steps["float32"])[1] > GRADIENT
