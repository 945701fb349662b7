"""Functions on arrays, nothing else: mathematics, NumPy reference and Numba kernel, one operation per file."""
