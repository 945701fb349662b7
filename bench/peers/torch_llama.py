"""Time a training step of the same model in PyTorch on the CPU, and print one JSON line.

    pip install torch==2.13.0 numpy --index-url https://download.pytorch.org/whl/cpu
    python bench/peers/torch_llama.py --shape tiny [--precision bf16] [--compile]

The model is abi_py's: pre-norm Llama, RMSNorm, rotate-half RoPE, grouped heads, SwiGLU, tied head, mean cross-entropy;
AdamW (fused) and clipping at 1.  It is written as one would write it in PyTorch, on its fast paths: fused attention,
fused RMSNorm.
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shapes import SHAPES
from worker import (
    ADAM_EPS,
    BETA1,
    BETA2,
    EPS,
    LEARNING_RATE,
    MAX_NORM,
    THETA,
    WEIGHT_DECAY,
    batch,
    first_weights,
    options_of,
    print_line,
    timed,
)


def rotary_table(length, width):
    """Return cos and sin (length, width), the angles repeated over both halves of a head."""
    rates = THETA ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), rates).repeat(1, 2)
    return angles.cos().float(), angles.sin().float()


def rotate(x, table):
    """Turn x (B, heads, T, D) by its positions."""
    cos, sin = table
    front, back = x.chunk(2, -1)
    return x * cos + torch.cat((-back, front), -1) * sin


class Layer(nn.Module):
    """Attention and feed-forward branch of one layer."""

    def __init__(self, shape):
        super().__init__()
        width = shape.hidden_dim // shape.num_heads
        self.heads, self.kv_heads, self.width = shape.num_heads, shape.num_kv_heads, width
        plan = {
            "w_q": (shape.hidden_dim, shape.hidden_dim),
            "w_k": (shape.num_kv_heads * width, shape.hidden_dim),
            "w_v": (shape.num_kv_heads * width, shape.hidden_dim),
            "w_o": (shape.hidden_dim, shape.hidden_dim),
            "w_gate": (shape.intermediate_dim, shape.hidden_dim),
            "w_up": (shape.intermediate_dim, shape.hidden_dim),
            "w_down": (shape.hidden_dim, shape.intermediate_dim),
        }
        for name, (rows, columns) in plan.items():
            setattr(self, name, nn.Parameter(torch.empty(rows, columns)))
        self.attn_norm, self.ffn_norm = (nn.Parameter(torch.ones(shape.hidden_dim)) for _ in range(2))

    def split(self, x, heads):
        """(B, T, heads D) -> (B, heads, T, D)."""
        return x.unflatten(-1, (heads, self.width)).transpose(1, 2)

    def forward(self, x, table):
        n = functional.rms_norm(x, x.shape[-1:], self.attn_norm, EPS)
        q = rotate(self.split(functional.linear(n, self.w_q), self.heads), table)
        k = rotate(self.split(functional.linear(n, self.w_k), self.kv_heads), table)
        v = self.split(functional.linear(n, self.w_v), self.kv_heads)
        if self.heads != self.kv_heads:  # the fused CPU kernel wants as many key/value heads as query heads
            k, v = (y.repeat_interleave(self.heads // self.kv_heads, dim=1) for y in (k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + functional.linear(mixed.transpose(1, 2).flatten(-2), self.w_o)
        n = functional.rms_norm(x, x.shape[-1:], self.ffn_norm, EPS)
        gate, up = functional.linear(n, self.w_gate), functional.linear(n, self.w_up)
        return x + functional.linear(functional.silu(gate) * up, self.w_down)


class Model(nn.Module):
    """ids and labels (B, T) -> mean loss."""

    def __init__(self, shape):
        super().__init__()
        self.token_embedding = nn.Parameter(torch.empty(shape.vocab_size, shape.hidden_dim))
        self.layers = nn.ModuleList([Layer(shape) for _ in range(shape.num_layers)])
        self.final_norm = nn.Parameter(torch.ones(shape.hidden_dim))
        self.table = rotary_table(shape.seq_len, shape.hidden_dim // shape.num_heads)

    def forward(self, ids, labels):
        x = functional.embedding(ids, self.token_embedding)
        for layer in self.layers:
            x = layer(x, self.table)
        x = functional.rms_norm(x, x.shape[-1:], self.final_norm, EPS)
        logits = functional.linear(x, self.token_embedding)
        return functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def main():
    """Read the options, time the steps, print the line."""
    flag = {"action": "store_true", "help": "use torch.compile"}
    options = options_of(__doc__.splitlines()[0], ("--compile", flag))
    torch.set_num_threads(options.threads)
    shape = SHAPES[options.shape]
    model = Model(shape)
    with torch.no_grad():
        for name, weight in first_weights(shape):
            model.get_parameter(name).copy_(torch.from_numpy(weight))
    matrices = [w for w in model.parameters() if w.ndim == 2]
    vectors = [w for w in model.parameters() if w.ndim == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(BETA1, BETA2), eps=ADAM_EPS, fused=True)
    call = torch.compile(model) if options.compile else model
    ids, labels = (torch.from_numpy(x).long() for x in batch(shape))

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
            loss = call(ids, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        return loss.item()

    losses, seconds = timed(step, options)
    count = sum(w.numel() for w in model.parameters())
    name = "torch compile" if options.compile else "torch eager"
    print_line(name, f"torch {torch.__version__}", options, losses, seconds, count)


if __name__ == "__main__":
    main()
