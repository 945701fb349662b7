"""The order of the rows of q and k in GGUF files of the architecture `llama`: this file alone knows it.

llama.cpp turns neighbouring numbers of such a head, (2j, 2j + 1), where RoPE here, as in Hugging Face's files, turns
(j, j + D/2) (`kernels/rope.py`).  So the files of this architecture keep the rows of each head in another order, and
so do they keep its biases: row 2j + s of a head is our row s D/2 + j, for s of 0 and 1.  Scores of attention are sums
over a head, so nothing else is concerned.  Source: `permute` of llama.cpp's converter for the architecture.
"""

import numpy as np

__all__ = ["rows_in_file", "rows_of_ours"]


def rows_in_file(heads: int, head_dim: int) -> np.ndarray:
    """Return, for each row of a file's matrix (heads * head_dim, C), which of our rows it is."""
    return np.arange(heads * head_dim).reshape(heads, 2, head_dim // 2).swapaxes(1, 2).ravel()


def rows_of_ours(heads: int, head_dim: int) -> np.ndarray:
    """Return, for each row of our matrix, which row of the file's it is."""
    return np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2).swapaxes(1, 2).ravel()
