"""One linear layer by itself: wherever its biases lie, and whatever its parts are kept in, it is y = x Wᵀ + b."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

from abi_py.kernels.storage import STORAGES
from abi_py.model.layers.linear import Linear, Projection
from abi_py.model.layers.run import Run
from abi_py.parameters import Buffers, Tensor, Weight

INPUTS, WIDTHS, ROWS = 12, {"q": 8, "k": 4, "v": 4}, 5
ORDERS = {  # name of a tensor in the buffer: which products there are
    "w_q w_k w_v b_q b_k b_v": 1,  # neighbours
    "w_q b_q w_k b_k w_v b_v": 3,  # a bias between two matrices is never a row of them
    "w_q w_k w_v b_q b_k": 1,  # a bias for some of the columns of a product
    "w_q b_v w_k w_v": 2,
    "w_q w_k b_q b_k b_v w_v": 2,  # biases that are neighbours over products that are not
    "w_k w_v w_q": 2,  # neighbours in memory, and in y not
}


def buffers_in(order, rng):
    """Return a buffer of tensors in this order."""
    table, offset = [], 0
    for name in order.split():
        width = WIDTHS[name[-1]]
        shape = (width, INPUTS) if name[0] == "w" else (width,)
        table.append(Tensor(name, name, name, shape, offset, decay=True))
        offset += table[-1].size
    buffers = Buffers(tuple(table))
    buffers.weights_flat[...] = rng.standard_normal(offset)
    return buffers


def bound(order, weights):
    """Return q, k and v, with those biases that the order names, as one layer."""
    biases = {part: f"b_{part}" if f"b_{part}" in order else "" for part in WIDTHS}
    linear = Linear(INPUTS, *(Projection(f"w_{part}", width, biases[part]) for part, width in WIDTHS.items()))
    linear.bind("", weights)
    return linear


def expected(x, weights):
    """Return y in float64."""
    x = x.astype(np.float64)
    return np.concatenate([x @ weights[f"w_{p}"].T + weights.get(f"b_{p}", 0) for p in WIDTHS], axis=1)


@pytest.mark.parametrize(("order", "add"), list(product(ORDERS, (False, True))))
def test_parts_and_biases_wherever_they_lie(rng, order, add):
    buffers, run = buffers_in(order, rng), Run(1, ROWS, None, np.arange(ROWS, dtype=np.int32), accumulate=False)
    linear = bound(order, buffers.weight)
    assert len(linear.products) == ORDERS[order]
    x, dy = (rng.standard_normal((ROWS, n)).astype(np.float32) for n in (INPUTS, linear.width))
    addend = rng.standard_normal(dy.shape).astype(np.float32) if add else None
    y, again, dx = np.empty_like(dy), np.empty_like(dy), np.empty_like(x)
    u, scratch = np.empty((0, ROWS), np.float32), SimpleNamespace(du=np.empty(0), dropped=np.empty(0))
    linear.forward(y, x, u, scratch, run, addend=addend)
    linear.decode(again, x, run, addend=addend)
    right = expected(x, buffers.weights) + (0 if addend is None else addend)
    assert np.abs(y - right).max() < 1e-5
    assert np.abs(again - right).max() < 1e-5
    gradients = buffers.gradients  # zeros: those of biases are added to
    linear.backward(dx, dy, x, u, scratch, run)
    shares = dict(zip(WIDTHS, np.split(dy, np.cumsum(list(WIDTHS.values()))[:-1], axis=1), strict=True))
    assert np.abs(dx - sum(shares[p] @ buffers.weights[f"w_{p}"] for p in WIDTHS)).max() < 1e-5
    for name, gradient in gradients.items():
        share = shares[name[-1]]
        assert np.abs(gradient - (share.T @ x if name[0] == "w" else share.sum(0))).max() < 1e-5


def test_parts_in_storages_of_their_own(rng):
    """A frozen part is no product with its neighbours, and its operations are counted from its shape."""
    order = "w_q w_k w_v b_q b_k b_v"
    buffers = buffers_in(order, rng)
    narrow = (buffers.weights["w_v"].view(np.uint32) >> 16).astype(np.uint16)
    buffers.weights["w_v"] = (narrow.astype(np.uint32) << 16).view(np.float32)  # what bfloat16 keeps of it

    def kept(name):
        raw, storage = (narrow, "bf16") if name == "w_v" else (buffers.weights[name], "float32")
        return Weight(name, raw, None, STORAGES[storage])

    mixed, plain = bound(order, kept), bound(order, lambda name: Weight(name, buffers.weights[name], None))
    assert [each.storage.name for each in mixed.products] == ["float32", "bf16"]
    blocks = bound(order, lambda name: Weight(name, np.zeros((4, 99), np.uint16), None, STORAGES["bf16"]))
    assert blocks.flops(True) == mixed.flops(True) == plain.flops(True) == 4 * INPUTS * sum(WIDTHS.values())
    x = rng.standard_normal((ROWS, INPUTS)).astype(np.float32)
    for linear in (mixed, plain):
        y, run = np.empty((ROWS, linear.width), np.float32), Run(1, ROWS, None, np.arange(ROWS, dtype=np.int32), False)
        linear.decode(y, x, run)
        assert np.abs(y - expected(x, buffers.weights)).max() < 1e-5
