"""Check and time one update of every optimizer on 16 million parameters: more than any cache holds."""

import numpy as np
from _bench import Bench

from abi_py.kernels.unchecked import adam_, adam_ref, adamw_, adamw_ref, parameter_chunks, sgd_, sgd_ref

P, SMALL = 16_000_000, 200_000  # timed, checked
MOMENTUM = 0.9, 0.01, False, 0.5  # momentum, weight decay, nesterov, gradient scale
ADAM = 0.9, 0.999, 1e-8, 0.01, 3, 0.5  # beta1, beta2, eps, weight decay, step, gradient scale
LR = 1e-3

rng = np.random.default_rng(0)
bench = Bench("optimizers", f"One update of {P} parameters")
w, m, g = (rng.standard_normal(P, dtype=np.float32) for _ in range(3))
v = np.square(m)
table = {
    "sgd": (sgd_, sgd_ref, (w, m, g), MOMENTUM, 20),
    "adam": (adam_, adam_ref, (w, m, v, g), ADAM, 28),
    "adamw": (adamw_, adamw_ref, (w, m, v, g), ADAM, 28),
}
chunks, decay = parameter_chunks([0], [P], [True])
few, few_decay = parameter_chunks([0], [SMALL], [True])
for name, (kernel, reference, arrays, settings, _) in table.items():
    small = [a[:SMALL].copy() for a in arrays]
    expected = reference(*(a.astype(np.float64) for a in small), 1.0, LR, *settings)
    kernel(*small, few, few_decay, LR, *settings)
    bench.check(name, small[0], expected[0], 1e-6)
for name, (kernel, reference, arrays, settings, per_element) in table.items():
    bench.time(
        name,
        lambda kernel=kernel, arrays=arrays, settings=settings: kernel(*arrays, chunks, decay, LR, *settings),
        bytes_moved=per_element * P,
        numpy=lambda reference=reference, arrays=arrays, settings=settings: reference(*arrays, 1.0, LR, *settings),
    )
bench.finish()
