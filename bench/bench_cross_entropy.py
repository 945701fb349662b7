"""Check and time the output head with its loss: the loss alone, and with both gradients."""

import numpy as np
from _bench import Bench

from abi_py.kernels.unchecked import head_loss, head_loss_backward, head_loss_ref, scratch_floats

# (N, C, V)
SHAPES = [(2048, 512, 4096), (512, 512, 32_000), (4096, 128, 256)]

rng = np.random.default_rng(0)
bench = Bench("cross_entropy", "Output head and cross-entropy: (rows, width, vocabulary)")
for N, C, V in SHAPES:
    x, w = (rng.standard_normal(shape).astype(np.float32) * 0.1 for shape in ((N, C), (V, C)))
    labels = rng.integers(0, V, N).astype(np.int32)
    fewer = np.where(labels % 4, labels, -100).astype(np.int32)
    losses, hits = np.empty(N, np.float32), np.empty(N, np.uint8)
    dx, dw = np.empty_like(x), np.empty_like(w)
    scratch = np.empty(scratch_floats(N, V, C), np.float32)

    def forward(losses=losses, hits=hits, x=x, w=w, labels=labels, scratch=scratch):
        head_loss(losses, hits, x, w, labels, scratch)

    def both(losses=losses, hits=hits, dx=dx, dw=dw, x=x, w=w, labels=labels, scratch=scratch, N=N):
        head_loss_backward(losses, hits, dx, dw, x, w, labels, scratch, 1 / N, 0.0, False)

    def some(losses=losses, hits=hits, dx=dx, dw=dw, x=x, w=w, labels=fewer, scratch=scratch, N=N):
        head_loss_backward(losses, hits, dx, dw, x, w, labels, scratch, 1 / N, 0.0, False)

    both()
    few = min(N, 512)
    name = f"{N} {C} {V}"
    expected = head_loss_ref(x[:few].astype(np.float64), w.astype(np.float64), labels[:few], 1 / N)
    bench.check(f"losses {name}", losses[:few], expected[0], 1e-5)
    bench.check(f"dx     {name}", dx[:few], expected[3], 1e-4)
    if few == N:
        bench.check(f"dw     {name}", dw, expected[4], 1e-4)
    flops = 2 * N * C * V
    bench.time(f"loss           {name}", forward, flops=flops)
    bench.time(f"with gradients {name}", both, flops=3 * flops)
    bench.time(f"3/4 count      {name}", some, flops=3 * flops * np.count_nonzero(fewer >= 0) // N)
bench.finish()
