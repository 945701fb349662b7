"""AdamW in 8 bits beside bitsandbytes' own on the CPU: the maps, the codes of an update, where thirty updates lead."""

import numpy as np
import pytest

from abi_py.kernels.adamw_8bit import adamw_8bit_, block_chunks, blocks_of
from abi_py.kernels.engine.dynamic_map import dynamic_map

SIZE, RATE, DECAY = 8192, 0.01, 0.1


@pytest.fixture
def theirs():
    """Return torch and bitsandbytes, or skip the test."""
    return pytest.importorskip("torch"), pytest.importorskip("bitsandbytes")


def fresh():
    """Return empty codes and scales of both moments."""
    blocks = blocks_of(SIZE)
    pairs = ((np.zeros((blocks, 256), np.uint8), np.zeros(blocks, np.float32)) for _ in range(2))
    return [array for pair in pairs for array in pair]


def test_the_maps_are_theirs(theirs):
    _, bitsandbytes = theirs
    for signed in (True, False):
        numbers = bitsandbytes.functional.create_dynamic_map(signed=signed).numpy()
        assert np.array_equal(dynamic_map(signed), numbers)


def test_updates(theirs, rng):
    """On the CPU theirs decays first too; it has neither of the rules about 0."""
    torch, bitsandbytes = theirs
    w = rng.standard_normal(SIZE).astype(np.float32)
    parameter = torch.nn.Parameter(torch.tensor(w))
    optimizer = bitsandbytes.optim.AdamW8bit([parameter], lr=RATE, weight_decay=DECAY)
    kept, cut, before = fresh(), block_chunks([0], [SIZE], [True]), w.copy()
    for step in range(1, 31):
        g = (rng.standard_normal(SIZE) * 10.0 ** rng.uniform(-2, 0, SIZE)).astype(np.float32)
        parameter.grad = torch.tensor(g)
        optimizer.step()
        adamw_8bit_(w, *kept, g, *cut, RATE, 0.9, 0.999, 1e-8, DECAY, step, 1.0)
        state = optimizer.state[parameter]
        if step > 1:
            continue
        assert np.abs(w - parameter.detach().numpy()).max() < 1e-6
        for k in (1, 2):
            codes, scales = (state[f"{name}{k}"].numpy() for name in ("state", "absmax"))
            np.testing.assert_allclose(kept[2 * k - 1], scales, rtol=1e-6)
            large = np.abs(dynamic_map(k == 1)[codes]) > 0.01  # of smaller numbers theirs is not always the nearest
            apart = np.abs(kept[2 * k - 2].ravel().astype(int) - codes)[large]
            assert large.sum() > SIZE / 4
            assert apart.max() <= 1
            assert (apart > 0).mean() < 0.01  # near the middle of two
    moved = np.abs(w - before).mean()
    assert np.abs(w - parameter.detach().numpy()).mean() < 0.01 * moved
