"""What one training step must compute and move, from its shape alone: plain formulas, no kernel is called here.

    N = B T rows    C width    H query and G key/value heads of width D    F feed-forward    V vocabulary    L layers
    P weights       pairs = B T (T + 1) / 2: (query, visible key) of all samples

    operations      a multiply-add counts two
      product       2 rows columns depth
      attention     forward 4 C pairs: q kᵀ and p v.  backward 10 C pairs: the scores again, dp, dv, dk, dq
      head          6 N V C: logits, dx, dw
      whole step    6 for each weight of a matrix and token (Kaplan et al. 2020, section 2.1), the head counted and the
                    embedding not, + 12 C pairs for each layer: what must be computed, so without the scores again

    bytes           float32; each array that an operation must read or write counts once, however often it is touched
      embedding     forward 8 N C (row in, row out), backward 12 N C (dx in, dw in and out), + 4 N of ids
      rms_norm      forward 8 N C + 4 N + 4 C.  backward 12 N C (dy, x in, dx out), or 16 N C where it adds to dx,
                    + 4 N + 8 C
      rope          8 N (H + G) D, in place, + 4 N of positions + 4 T D of the table; in bfloat16, forward also reads
                    and saves the whole row: 6 N (H + 2 G) D
      swiglu        forward 12 N F (two in, one out).  backward 24 N F (dh, gate, up in, three out)
                    in bfloat16, which is how gate and up are saved then: forward 16 N F (two in; two saved, one out),
                    backward 20 N F
      global norm   4 P
      AdamW         28 P: w, m, v, g in, w, m, v out
"""

from typing import NamedTuple

FORMS = ("y", "dx", "dw")  # x Wᵀ, dy W, dyᵀ x


class Product(NamedTuple):
    """A matrix product (rows, depth) x (depth, columns) that a step does `calls` times."""

    weight: str
    form: str
    rows: int
    columns: int
    depth: int
    calls: int

    @property
    def name(self):
        """The weight and the form: "w_o dw"."""
        return f"{self.weight} {self.form}"

    @property
    def flops(self):
        """Operations of one call."""
        return 2 * self.rows * self.columns * self.depth


class Stage(NamedTuple):
    """A kernel, or one use of it, in a step: `flops` and `bytes` are of one call, and one of them may be 0.

    `layers` is the number of places in memory that its calls go round: each layer's activations are its own.
    """

    name: str
    kind: str  # product, attention (bound by arithmetic) or memory
    calls: int
    layers: int
    flops: int
    bytes: int


def head_dim(shape):
    """Return the width of a head."""
    return shape.hidden_dim // shape.num_heads


def kv_width(shape):
    """Return the width of all keys of a row, G D."""
    return shape.num_kv_heads * head_dim(shape)


def linear_layers(shape):
    """Return {name: (outputs, inputs)} of one layer's matrices; those that are one product count as one."""
    c, f = shape.hidden_dim, shape.intermediate_dim
    return {"w_q w_k w_v": (c + 2 * kv_width(shape), c), "w_o": (c, c), "w_gate w_up": (2 * f, c), "w_down": (c, f)}


def parameters(shape):
    """Return the number of weights; the head is tied."""
    matrices = sum(rows * columns for rows, columns in linear_layers(shape).values())
    norms = 2 * shape.hidden_dim
    return shape.num_layers * (matrices + norms) + shape.vocab_size * shape.hidden_dim + shape.hidden_dim


def pairs(shape):
    """Return the pairs of a query and a key that it sees."""
    return shape.batch_size * shape.seq_len * (shape.seq_len + 1) // 2


def attention_flops(shape):
    """Return the operations that attention must do in a step, forward and backward."""
    return 12 * shape.num_layers * shape.hidden_dim * pairs(shape)


def step_flops(shape):
    """Return the operations of a whole step."""
    matrices = shape.num_layers * sum(rows * columns for rows, columns in linear_layers(shape).values())
    return 6 * shape.tokens * (matrices + shape.vocab_size * shape.hidden_dim) + attention_flops(shape)


def _three(weight, rows, outputs, inputs, calls):
    """Return the three products of a linear layer of `rows` rows."""
    sizes = {"y": (rows, outputs, inputs), "dx": (rows, inputs, outputs), "dw": (outputs, inputs, rows)}
    return [Product(weight, form, *sizes[form], calls) for form in FORMS]


def layer_products(shape):
    """Return the products of the layers."""
    found = []
    for weight, (outputs, inputs) in linear_layers(shape).items():
        found += _three(weight, shape.tokens, outputs, inputs, shape.num_layers)
    return found


def head_products(shape, chunk):
    """Return the products of the head, which goes through the rows in chunks of at most `chunk`."""
    whole, rest = divmod(shape.tokens, chunk)
    found = []
    for rows, calls in ((chunk, whole), (rest, 1)):
        if rows and calls:
            found += _three(f"head of {rows} rows", rows, shape.vocab_size, shape.hidden_dim, calls)
    return found


def stages(shape, bf16=False):
    """Return the stages of a step; rms_norm runs once more in backward, where its output is not saved."""
    rows, c, f, layers = shape.tokens, shape.hidden_dim, shape.intermediate_dim, shape.num_layers
    size, turned = parameters(shape), shape.hidden_dim + kv_width(shape)
    rope = 8 * rows * turned + 4 * rows + 4 * shape.seq_len * head_dim(shape)
    norm = 8 * rows * c + 4 * rows + 4 * c
    norm_backward = 12 * rows * c + 4 * rows + 8 * c
    if bf16:  # rotated in place, then all of it is saved
        rope_forward = rope + 6 * rows * (turned + kv_width(shape))
        swiglu = [
            Stage("swiglu y", "memory", layers, layers, 0, 16 * rows * f),
            Stage("swiglu dx", "memory", layers, layers, 0, 20 * rows * f),
        ]
    else:
        rope_forward = rope
        swiglu = [
            Stage("swiglu y", "memory", layers, layers, 0, 12 * rows * f),
            Stage("swiglu dx", "memory", layers, layers, 0, 24 * rows * f),
        ]
    found = [Stage(p.name, "product", p.calls, layers, p.flops, 0) for p in layer_products(shape)]
    return found + [
        Stage("attention y", "attention", layers, layers, 4 * c * pairs(shape), 0),
        Stage("attention dx", "attention", layers, layers, 10 * c * pairs(shape), 0),
        Stage("head and loss", "product", 1, 1, 6 * rows * shape.vocab_size * c, 0),
        Stage("rms_norm y", "memory", 4 * layers, layers, 0, norm),
        Stage("rms_norm dx", "memory", 2 * layers, layers, 0, norm_backward + 4 * rows * c),
        Stage("final rms_norm y", "memory", 1, 1, 0, norm),
        Stage("final rms_norm dx", "memory", 1, 1, 0, norm_backward),
        Stage("rope y", "memory", layers, layers, 0, rope_forward),
        Stage("rope dx", "memory", layers, layers, 0, rope),
        *swiglu,
        Stage("embedding y", "memory", 1, 1, 0, 8 * rows * c + 4 * rows),
        Stage("embedding dx", "memory", 1, 1, 0, 12 * rows * c + 4 * rows),
        Stage("global norm", "memory", 1, 1, 0, 4 * size),
        Stage("clip and AdamW", "memory", 1, 1, 0, 28 * size),
    ]
