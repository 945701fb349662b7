"""Check and time encoding and decoding of every storage: float32 in, bytes out, and back; NumPy's decoding beside.

GB/s count both, as memory moves them.  With `--threads 1` a row is what one core does.
"""

import numpy as np
from _bench import Bench

from abi_py.kernels.storage import OF_A_MATRIX, STORAGES

M, K = 256, 4096  # 4 MB in float32
PART = 8  # rows that NumPy encodes as a check

bench = Bench("storages", f"{M} x {K} numbers encoded and decoded")
rng = np.random.default_rng(0)
x = rng.standard_normal((M, K)).astype(np.float32)
importance = rng.random(K).astype(np.float32)
out = np.empty_like(x)
for name, storage in STORAGES.items():
    raw = np.empty((M, storage.items(K)), storage.dtype)
    storage.encode(raw, x)
    bench.check(f"encode {name}", raw[:PART], storage.encode_ref(x[:PART]), 0)
    storage.decode(out, raw, 0)
    bench.check(f"decode {name}", out, storage.decode_ref(raw), 0)
    moved = x.nbytes + raw.nbytes
    bench.time(f"encode {name}", lambda raw=raw, storage=storage: storage.encode(raw, x), bytes_moved=moved)
    if storage.weighted:
        bench.time(
            f"encode {name} weighted",
            lambda raw=raw, storage=storage: storage.encode(raw, x, importance),
            bytes_moved=moved,
        )
    bench.time(
        f"decode {name}",
        lambda raw=raw, storage=storage: storage.decode(out, raw, 0),
        bytes_moved=moved,
        numpy=lambda raw=raw, storage=storage: storage.decode_ref(raw),
    )
for name, storage in OF_A_MATRIX.items():
    raw, kept = storage.encoded(x)
    bench.check(f"encode {name}", raw, storage.encoded_ref(x)[0], 0)
    kept.decode(out, raw, 0)
    bench.check(f"decode {name}", out, kept.decode_ref(raw), 0)
    moved = x.nbytes + raw.nbytes + kept.side_bytes
    bench.time(f"encode {name}", lambda storage=storage: storage.encoded(x), bytes_moved=moved)
    bench.time(
        f"decode {name}",
        lambda raw=raw, kept=kept: kept.decode(out, raw, 0),
        bytes_moved=moved,
        numpy=lambda raw=raw, kept=kept: kept.decode_ref(raw),
    )
bench.finish()
