"""Time a training step of the same model in PyTorch on the CPU, and print one JSON line.

    python bench/peers/torch_llama.py --shape tiny [--precision bf16] [--compile]

The model is abi_py's: pre-norm Llama, RMSNorm, rotate-half RoPE, grouped heads, SwiGLU, tied head, mean cross-entropy;
AdamW (fused) and clipping at 1.  It is written as one would write it in PyTorch, on its fast paths: fused attention,
fused RMSNorm.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shapes import SHAPES

EPS, THETA = 1e-5, 1e4


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
            setattr(self, name, nn.Parameter(0.02 * torch.randn(rows, columns)))
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
        self.token_embedding = nn.Parameter(0.02 * torch.randn(shape.vocab_size, shape.hidden_dim))
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="model and batch, see ../shapes.py")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads inside operations")
    parser.add_argument("--steps", type=int, default=6, help="steps that count")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shape = SHAPES[options.shape]
    model = Model(shape)
    matrices = [w for w in model.parameters() if w.ndim == 2]
    vectors = [w for w in model.parameters() if w.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
    call = torch.compile(model) if options.compile else model
    ids, labels = torch.randint(shape.vocab_size, (2, shape.batch_size, shape.seq_len))
    losses, seconds = [], []
    for _ in range(options.warmup + options.steps):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
            loss = call(ids, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    counted = seconds[options.warmup :]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes, on a Mac bytes
    median = statistics.median(counted)
    line = {
        "peer": "torch compile" if options.compile else "torch eager",
        "shape": options.shape,
        "precision": options.precision,
        "threads": options.threads,
        "parameters": sum(w.numel() for w in model.parameters()),
        "first_loss": round(losses[0], 4),
        "step_s": round(median, 5),
        "best_step_s": round(min(counted), 5),
        "tokens_per_s": round(shape.tokens / median, 1),
        "peak_rss_mb": round(peak / (2**20 if sys.platform == "darwin" else 2**10)),
        "version": f"torch {torch.__version__}",
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
