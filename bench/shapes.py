"""Models and batches that whole steps are timed with, ours and the peers'.

Plain numbers without further imports: the interpreter of a peer reads them, too.
"""

from typing import NamedTuple


class Shape(NamedTuple):
    """A model and its batch; the head is tied, and heads are hidden_dim / num_heads wide."""

    vocab_size: int
    hidden_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_dim: int
    batch_size: int
    seq_len: int

    @property
    def tokens(self):
        """Tokens of one step."""
        return self.batch_size * self.seq_len

    def model_fields(self):
        """Return the fields of `TrainableModelConfig`, by name."""
        fields = self._asdict()
        del fields["batch_size"]
        return fields | {"max_seq_len": fields.pop("seq_len")}


SHAPES = {
    #                       V      C   L   H   G      F  B     T
    "demo": Shape(        256,    64,  2,  4,  4,   128, 2,   32),
    "tiny": Shape(      2_000,   128,  2,  4,  4,   384, 8,  256),
    "small": Shape(     4_096,   256,  6,  8,  4,   768, 8,  256),
    "deepzig": Shape(  32_000,   512,  8,  8,  8, 1_536, 4,  512),
    "deepzig-gqa": Shape(32_000, 512,  8,  8,  4, 1_536, 4,  512),
    "long": Shape(      4_096,   512,  8,  8,  4, 1_536, 1, 4_096),
    "medium": Shape(   16_000,   768, 12, 12, 12, 2_304, 2,  512),
}
