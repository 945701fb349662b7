"""Check and time Muon's update of one matrix: (rows, columns)."""

import numpy as np
from _bench import Bench

from abi_py.kernels.muon import muon_flops, muon_ratio
from abi_py.kernels.unchecked import muon_, muon_ref

SHAPES = [(512, 512), (512, 1536), (1536, 512)]
REST = 0.95, True, 0.1, 5, 0.5  # momentum, nesterov, weight decay, steps, gradient scale
LR = 0.02

rng = np.random.default_rng(0)
bench = Bench("muon", "Muon's update of a matrix: (rows, columns)")
for rows, columns in SHAPES:
    w, m, g = rng.standard_normal((3, rows, columns), dtype=np.float32)
    settings = LR, muon_ratio(rows, columns, True), *REST
    expected = muon_ref(*(a.astype(np.float64) for a in (w, m, g)), *settings)
    found = w.copy(), m.copy()
    muon_(*found, g, *settings)
    bench.check(f"w {rows} {columns}", found[0], expected[0], 1e-5)
    bench.time(
        f"update {rows} {columns}",
        lambda w=w, m=m, g=g, settings=settings: muon_(w, m, g, *settings),
        flops=muon_flops(rows, columns),
        numpy=lambda w=w, m=m, g=g, settings=settings: muon_ref(w, m, g, *settings),
    )
bench.finish()
