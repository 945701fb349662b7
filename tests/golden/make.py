"""Make the golden files: what PyTorch says each operation is.

    python tests/golden/make.py                 make all
    python tests/golden/make.py rope attention  make some
    python tests/golden/make.py --check         make all in memory, compare with the stored files; exit 1 if one differs

This script alone needs PyTorch; the tests read only the .npz files.  Each file holds inputs, random upstream
gradients, outputs and gradients of one operation, and `meta`, a JSON text with the versions, the seed and the
command.  Everything is float64 on one thread unless the function below says otherwise.  The code here is written from
the definitions, and shares nothing with `abi_py`.
"""

import json
import math

import numpy as np
import torch
from stored import main, meta
from torch.nn import functional

IGNORE = -100


def leaf(array):
    """Return a tensor that collects a gradient."""
    return torch.tensor(array, requires_grad=True)


def numpy_of(**tensors):
    """Return the tensors as arrays, by the same names."""
    return {name: np.asarray(value.detach()) for name, value in tensors.items()}


# -- operations: one function each, (generator) -> {name: array} ---------------------------------


def embedding(rng):
    ids = rng.integers(0, 11, 17)  # 17 rows of 11 tokens: some come twice
    w, dx = rng.standard_normal((11, 5)), rng.standard_normal((17, 5))
    table = leaf(w)
    x = functional.embedding(torch.tensor(ids), table)
    x.backward(torch.tensor(dx))
    return {"ids": ids.astype(np.int32), "w": w, "dx": dx} | numpy_of(x=x, dw=table.grad)


def torch_rms_norm(x, w, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w


def rms_norm(rng):
    x, w, dy = rng.standard_normal((7, 13)), 1 + 0.3 * rng.standard_normal(13), rng.standard_normal((7, 13))
    tx, tw = leaf(x), leaf(w)
    y = torch_rms_norm(tx, tw, 1e-5)
    y.backward(torch.tensor(dy))
    return {"x": x, "w": w, "dy": dy, "eps": 1e-5} | numpy_of(y=y, dx=tx.grad, dw=tw.grad)


def layer_norm(rng):
    x, w, dy = 2 + rng.standard_normal((7, 13)), 1 + 0.3 * rng.standard_normal(13), rng.standard_normal((7, 13))
    b = rng.standard_normal(13)
    tx, tw, tb = leaf(x), leaf(w), leaf(b)
    y = functional.layer_norm(tx, (13,), tw, tb, 1e-5)
    y.backward(torch.tensor(dy))
    return {"x": x, "w": w, "b": b, "dy": dy, "eps": 1e-5} | numpy_of(y=y, dx=tx.grad, dw=tw.grad, db=tb.grad)


def torch_rope(x, positions, theta):
    """Rotate x (B, H, T, D) as Hugging Face's Llama does: cos and sin repeated over both halves, and rotate_half."""
    D = x.shape[-1]
    frequencies = 1.0 / theta ** (torch.arange(0, D, 2, dtype=x.dtype) / D)
    angles = positions[:, None].to(x.dtype) * frequencies
    angles = torch.cat((angles, angles), -1)  # (T, D)
    rotated = torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1)
    return x * angles.cos() + rotated * angles.sin()


def rope(rng):
    heads, D, N, extra = 3, 8, 10, 5
    x, dy = rng.standard_normal((N, heads * D + extra)), rng.standard_normal((N, heads * D + extra))
    positions = np.array([0, 1, 2, 3, 4, 0, 1, 2, 700, 11], np.int32)
    tx = leaf(x)
    pairs = tx[:, : heads * D].reshape(1, N, heads, D).transpose(1, 2)
    turned = torch_rope(pairs, torch.tensor(positions), 1e4).transpose(1, 2).reshape(N, heads * D)
    y = torch.cat((turned, tx[:, heads * D :]), 1)
    y.backward(torch.tensor(dy))
    angles = torch.arange(701, dtype=torch.float64)[:, None] / 1e4 ** (torch.arange(0, D, 2, dtype=torch.float64) / D)
    saved = {"x": x, "dy": dy, "positions": positions, "heads": heads, "theta": 1e4}
    return saved | numpy_of(cos=angles.cos(), sin=angles.sin(), y=y, dx=tx.grad)


def swiglu(rng):
    gate_up, dh = 3 * rng.standard_normal((9, 14)), rng.standard_normal((9, 7))
    both = leaf(gate_up)
    gate, up = both.chunk(2, 1)
    h = functional.silu(gate) * up
    h.backward(torch.tensor(dh))
    return {"gate_up": gate_up, "dh": dh} | numpy_of(h=h, dgate_up=both.grad)


def gelu(rng):
    saved = {}
    for kind, approximate in (("exact", "none"), ("tanh", "tanh")):
        u, dh = 3 * rng.standard_normal((9, 7)), rng.standard_normal((9, 7))
        both, gated_dh = 3 * rng.standard_normal((9, 14)), rng.standard_normal((9, 7))
        tu, tboth = leaf(u), leaf(both)
        h = functional.gelu(tu, approximate=approximate)
        h.backward(torch.tensor(dh))
        gate, up = tboth.chunk(2, 1)
        gated_h = functional.gelu(gate, approximate=approximate) * up
        gated_h.backward(torch.tensor(gated_dh))
        arrays = {"u": u, "dh": dh, "gated_u": both, "gated_dh": gated_dh}
        arrays |= numpy_of(h=h, du=tu.grad, gated_h=gated_h, gated_du=tboth.grad)
        saved |= {f"{kind}_{name}": array for name, array in arrays.items()}
    return saved


def router(rng):
    logits, dgates, K = 2 * rng.standard_normal((11, 7)), rng.standard_normal((11, 3)), 3
    found = {"logits": logits, "dgates": dgates}
    for rule in ("renormalised", "plain"):  # the lines of transformers' MixtralTopKRouter and Qwen3MoeTopKRouter
        x = leaf(logits)
        gates, chosen = torch.topk(functional.softmax(x, dim=-1), K, dim=-1)
        if rule == "renormalised":
            gates = gates / gates.sum(dim=-1, keepdim=True)
        gates.backward(torch.tensor(dgates))
        found |= numpy_of(chosen=chosen, **{f"gates_{rule}": gates, f"dlogits_{rule}": x.grad})
    return found


def experts(rng):
    N, K, E, C, F = 9, 2, 4, 6, 5
    x, dout = rng.standard_normal((N, C)), rng.standard_normal((N, C))
    gates = rng.random((N, K))
    chosen = np.stack([rng.permutation(E - 1)[:K] for _ in range(N)])  # the last expert has no token
    w = {"gate": (E, F, C), "up": (E, F, C), "down": (E, C, F)}
    w = {name: rng.standard_normal(shape) for name, shape in w.items()}
    tx, tg, tw = leaf(x), leaf(gates), {name: leaf(value) for name, value in w.items()}
    rows = []
    for n in range(N):  # each token by itself, from the definition
        total = tx[n]
        for j, e in enumerate(chosen[n]):
            h = functional.silu(tw["gate"][e] @ tx[n]) * (tw["up"][e] @ tx[n])
            total = total + tg[n, j] * (tw["down"][e] @ h)
        rows.append(total)
    out = torch.stack(rows)
    out.backward(torch.tensor(dout))
    found = {"x": x, "dout": dout, "gates": gates, "chosen": chosen.astype(np.int32), **w}
    found |= {f"d{name}": value.grad.numpy() for name, value in tw.items()}
    return found | numpy_of(out=out, dx=tx.grad, dgates=tg.grad)


def keep(seed, i, j, rate):
    """Say whether dropout keeps element (i, j): the hash of docs/4-dropout.md in Python's own integers."""
    z = (seed * 0x9E3779B97F4A7C15 + i + 1 + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    z ^= z >> 31
    k = (j + z) % 2**32
    k = (k ^ (k >> 16)) * 0x7FEB352D % 2**32
    k = (k ^ (k >> 15) ^ (z >> 32)) * 0x846CA68B % 2**32
    return (k ^ (k >> 16)) >= int(rate * 2**32)


def dropout(rng):
    rate, seed, (N, C) = 0.3, 1234567890123456789, (11, 23)
    x, dy = rng.standard_normal((N, C)), rng.standard_normal((N, C))
    mask = np.array([[keep(seed, i, j, rate) for j in range(C)] for i in range(N)])
    tx = leaf(x)
    y = tx * torch.tensor(mask) / (1 - rate)
    y.backward(torch.tensor(dy))
    return {"x": x, "dy": dy, "rate": rate, "seed": seed, "mask": mask} | numpy_of(y=y, dx=tx.grad)


def optimizers(rng):
    """Five updates of two tensors, the first with weight decay and the second without, by each optimizer of PyTorch."""
    sizes, steps = (6, 5), 5
    start, gradients = rng.standard_normal(sum(sizes)), rng.standard_normal((steps, sum(sizes)))
    classes = {
        "sgd": (torch.optim.SGD, {"momentum": 0.0}),
        "sgd_momentum": (torch.optim.SGD, {"momentum": 0.9}),
        "sgd_nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        "adam": (torch.optim.Adam, {"betas": (0.9, 0.999), "eps": 1e-8}),
        "adamw": (torch.optim.AdamW, {"betas": (0.9, 0.999), "eps": 1e-8}),
    }
    saved = {"w": start, "g": gradients, "sizes": np.array(sizes), "lr": 0.01, "weight_decay": 0.1}
    for name, (optimizer_class, options) in classes.items():
        tensors = [torch.nn.Parameter(torch.tensor(part)) for part in np.split(start, [sizes[0]])]
        groups = [{"params": [tensors[0]], "weight_decay": 0.1}, {"params": [tensors[1]], "weight_decay": 0.0}]
        optimizer = optimizer_class(groups, lr=0.01, foreach=False, **options)
        history = []
        for gradient in gradients:
            for tensor, part in zip(tensors, np.split(gradient, [sizes[0]]), strict=True):
                tensor.grad = torch.tensor(part)
            optimizer.step()
            history.append(torch.cat([tensor.detach() for tensor in tensors]).numpy().copy())
        saved[name] = np.stack(history)  # (steps, P): w after each update
    return saved


def muon(rng):
    """Ten updates of a wide, a tall and a square matrix by torch.optim.Muon.

    PyTorch iterates in bfloat16.  `exact` are its figures with that conversion left out, so all is float64: what the
    formulas give.  `bf16` are its figures as they are.
    """
    shapes, steps, settings = ((5, 12), (11, 4), (6, 6)), 10, {"lr": 0.02, "weight_decay": 0.1}
    start = [rng.standard_normal(shape) for shape in shapes]
    gradients = [[rng.standard_normal(shape) for shape in shapes] for _ in range(steps)]
    saved = {f"w{i}": w for i, w in enumerate(start)} | settings
    saved |= {f"g{i}": np.stack([each[i] for each in gradients]) for i in range(len(shapes))}
    kinds = {
        "original": {"adjust_lr_fn": "original"},
        "match_rms": {"adjust_lr_fn": "match_rms_adamw"},
        "plain": {"adjust_lr_fn": "original", "nesterov": False, "momentum": 0.8, "ns_steps": 3},
    }
    rounded = torch.Tensor.bfloat16
    for precision in ("exact", "bf16"):
        for kind, options in kinds.items():
            tensors = [torch.nn.Parameter(torch.tensor(w)) for w in start]
            optimizer = torch.optim.Muon(tensors, **settings, **options)
            torch.Tensor.bfloat16 = torch.Tensor.clone if precision == "exact" else rounded
            for gradient in gradients:
                for tensor, part in zip(tensors, gradient, strict=True):
                    tensor.grad = torch.tensor(part)
                optimizer.step()
            torch.Tensor.bfloat16 = rounded
            saved |= {f"{precision}_{kind}{i}": tensor.detach().numpy() for i, tensor in enumerate(tensors)}
    return saved


def adamw_8bit(rng):
    """Six AdamW updates whose moments are kept in 8 bits between them, as bitsandbytes does it.

    The formulas of `create_dynamic_map` and of the update are written with PyTorch alone.  Of both moments the nearest
    code is taken; no negative m is coded as 0, nor is a v above 0.
    """
    lr, weight_decay, steps, size = 0.01, 0.1, 6, 300
    w = torch.tensor(rng.standard_normal(size))
    gradients = rng.standard_normal((steps, size)) * 10.0 ** rng.uniform(-4, 0, size)

    def numbers(signed):
        found = [0.0, 1.0]
        for i in range(7):
            ends = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, dtype=torch.float32)
            middles = (10 ** (i - 6) * ((ends[:-1] + ends[1:]) / 2.0)).tolist()
            found += middles + ([-x for x in middles] if signed else [])
        return torch.tensor(sorted(found), dtype=torch.float32)

    def kept(x, table, signed):
        """Return codes and what they mean, of blocks of 256."""
        codes, meant = [], []
        for block in x.split(256):
            scale = block.abs().max()
            code = ((block / scale)[:, None] - table.double()).abs().argmin(1)
            zero = 127 if signed else 0
            lost = (code == zero) & (block < 0 if signed else block > 0)
            code = torch.where(lost, zero - 1 if signed else 1, code)
            codes.append(code)
            meant.append(table.double()[code] * scale)
        return torch.cat(codes), torch.cat(meant)

    tables = numbers(True), numbers(False)
    saved = {"w": w.numpy().copy(), "g": gradients, "lr": lr, "weight_decay": weight_decay}
    state, after, codes = None, [], ([], [])
    for step, gradient in enumerate(gradients, 1):
        parameter = torch.nn.Parameter(w.clone())
        optimizer = torch.optim.AdamW([parameter], lr=lr, weight_decay=weight_decay)
        parameter.grad = torch.tensor(gradient)
        if state is not None:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step - 1)),
                "exp_avg": state[0],
                "exp_avg_sq": state[1],
            }
        optimizer.step()
        mine = optimizer.state[parameter]
        w = parameter.detach()
        after.append(w.numpy().copy())
        state = []
        for k, name in enumerate(("exp_avg", "exp_avg_sq")):
            code, meant = kept(mine[name], tables[k], k == 0)
            codes[k].append(code.numpy().astype(np.uint8))
            state.append(meant)
    return saved | {"after": np.stack(after), "m_codes": np.stack(codes[0]), "v_codes": np.stack(codes[1])}


def global_norm(rng):
    parts = [rng.standard_normal(n) for n in (1, 13, 300)]
    tensors = [torch.nn.Parameter(torch.zeros(len(part), dtype=torch.float64)) for part in parts]
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.grad = torch.tensor(part)
    norm = torch.nn.utils.clip_grad_norm_(tensors, math.inf)
    return {"g": np.concatenate(parts)} | numpy_of(norm=norm)


def attention(rng):
    """Causal attention with grouped heads: q (B, H, T, D), k and v (B, G, T, D); alone, and within segments (B, T)."""
    B, H, G, T, D = 2, 4, 2, 19, 8
    q, k, v, do = (rng.standard_normal((B, heads, T, D)) for heads in (H, G, G, H))
    segments = np.array([[0] * 7 + [1] * 12, [0] * 1 + [1] * 10 + [2] * 8], np.int32)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    same = torch.tensor(segments[:, None, :, None] == segments[:, None, None, :])
    saved = {"q": q, "k": k, "v": v, "do": do, "segments": segments}
    for name, mask in {"causal": causal.expand(B, 1, T, T), "segment": causal & same}.items():
        tq, tk, tv = leaf(q), leaf(k), leaf(v)
        o = functional.scaled_dot_product_attention(tq, tk, tv, attn_mask=mask, enable_gqa=True)
        o.backward(torch.tensor(do))
        made = numpy_of(o=o, dq=tq.grad, dk=tk.grad, dv=tv.grad)
        saved |= {f"{name}_{key}": value for key, value in made.items()}
    return saved


def cross_entropy(rng):
    """Head and loss: logits = x w^T, mean over the labels that are not ignored; with label smoothing, with z-loss."""
    N, C, V = 23, 12, 31
    x, w = rng.standard_normal((N, C)), rng.standard_normal((V, C))
    labels = rng.integers(0, V, N)
    labels[[0, 7, 8, 22]] = IGNORE
    saved = {"x": x, "w": w, "labels": labels.astype(np.int32), "ignore_index": IGNORE}
    cases = {"plain": (0.0, 0.0), "smooth": (0.1, 0.0), "z": (0.0, 0.02), "smooth_z": (0.1, 0.02)}
    for name, (smoothing, z_loss) in cases.items():
        tx, tw = leaf(x), leaf(w)
        logits = tx @ tw.T
        loss = functional.cross_entropy(
            logits, torch.tensor(labels), ignore_index=IGNORE, label_smoothing=smoothing, reduction="mean"
        )
        loss = loss + z_loss * logits.logsumexp(1)[torch.tensor(labels != IGNORE)].square().mean()
        loss.backward()
        rows = functional.cross_entropy(
            logits, torch.tensor(labels), ignore_index=IGNORE, label_smoothing=smoothing, reduction="none"
        )
        correct = ((logits.argmax(1) == torch.tensor(labels)) & torch.tensor(labels != IGNORE)).sum()
        made = numpy_of(loss=loss, rows=rows, dx=tx.grad, dw=tw.grad, correct=correct)
        saved |= {f"{name}_{key}": value for key, value in made.items()}
    return saved


# -- a whole small Llama -------------------------------------------------------------------------

CONFIG = {
    "hidden_dim": 48,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_dim": 80,
    "vocab_size": 97,  # a prime
    "max_seq_len": 32,
    "rope_theta": 1e4,
    "norm_eps": 1e-5,
}


def layer_shapes(C, kv, F):
    return {
        "w_q": (C, C),
        "w_k": (kv, C),
        "w_v": (kv, C),
        "w_o": (C, C),
        "attn_norm": (C,),
        "w_gate": (F, C),
        "w_up": (F, C),
        "w_down": (C, F),
        "ffn_norm": (C,),
    }


def random_weights(rng, tied, std):
    """Return weights by name that are exact in float16: the file stays small, and every dtype holds the same."""
    C, V = CONFIG["hidden_dim"], CONFIG["vocab_size"]
    kv = C // CONFIG["num_heads"] * CONFIG["num_kv_heads"]
    shapes = {"token_embedding": (V, C)}
    for i in range(CONFIG["num_layers"]):
        per_layer = layer_shapes(C, kv, CONFIG["intermediate_dim"])
        shapes |= {f"layers.{i}.{name}": shape for name, shape in per_layer.items()}
    shapes["final_norm"] = (C,)
    if not tied:
        shapes["output_proj"] = (V, C)
    normal = {name: std * rng.standard_normal(shape) for name, shape in shapes.items()}
    return {name: (w + (w.ndim == 1)).astype(np.float16) for name, w in normal.items()}  # norms lie around 1


def llama_logits(weights, ids):
    """Return logits (B, T, V) for ids (B, T): the Llama of Hugging Face, in the dtype of the weights."""
    B, T = ids.shape
    H, G, C = CONFIG["num_heads"], CONFIG["num_kv_heads"], CONFIG["hidden_dim"]
    eps, theta = CONFIG["norm_eps"], CONFIG["rope_theta"]
    positions = torch.arange(T)
    x = functional.embedding(ids, weights["token_embedding"])
    for i in range(CONFIG["num_layers"]):
        w = {name: weights[f"layers.{i}.{name}"] for name in layer_shapes(0, 0, 0)}
        y = torch_rms_norm(x, w["attn_norm"], eps)
        q, k, v = (
            functional.linear(y, w[name]).view(B, T, heads, C // H).transpose(1, 2)
            for name, heads in (("w_q", H), ("w_k", G), ("w_v", G))
        )
        q, k = torch_rope(q, positions, theta), torch_rope(k, positions, theta)
        o = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + functional.linear(o.transpose(1, 2).reshape(B, T, C), w["w_o"])
        y = torch_rms_norm(x, w["ffn_norm"], eps)
        h = functional.silu(functional.linear(y, w["w_gate"])) * functional.linear(y, w["w_up"])
        x = x + functional.linear(h, w["w_down"])
    x = torch_rms_norm(x, weights["final_norm"], eps)
    return functional.linear(x, weights.get("output_proj", weights["token_embedding"]))


def llama_loss(weights, ids, labels):
    logits = llama_logits(weights, ids)
    return logits, functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)


def tiny_model(rng, tied):
    """Logits, loss and every gradient in float64; the gradients are stored in float32 to keep the file small."""
    stored = random_weights(rng, tied, std=0.15)  # larger than a fresh model's, so that attention is far from uniform
    ids = rng.integers(0, CONFIG["vocab_size"], (2, 13))
    labels = rng.integers(0, CONFIG["vocab_size"], (2, 13))
    labels[0, 3] = labels[1, 0] = labels[1, 12] = IGNORE
    weights = {name: leaf(w.astype(np.float64)) for name, w in stored.items()}
    logits, loss = llama_loss(weights, torch.tensor(ids), torch.tensor(labels))
    loss.backward()
    saved = {"config": json.dumps(CONFIG | {"tie_embeddings": tied})}
    saved |= {"ids": ids.astype(np.int32), "labels": labels.astype(np.int32)}
    saved |= numpy_of(loss=loss, logits=logits.to(torch.float32))
    saved |= {f"weight/{name}": w for name, w in stored.items()}
    return saved | {f"gradient/{name}": w.grad.numpy().astype(np.float32) for name, w in weights.items()}


def model_tiny(rng):
    return tiny_model(rng, tied=True)


def model_tiny_untied(rng):
    return tiny_model(rng, tied=False)


def learning_rate(step, base=1e-3, minimum=1e-5, warmup=5, decay=20):
    """Warm-up from base / warmup, then half a cosine from base to minimum; `step` counts from 0."""
    if step < warmup:
        return base * (step + 1) / warmup
    p = min(1.0, (step - warmup) / (decay - warmup))
    return minimum + (base - minimum) * 0.5 * (1 + math.cos(math.pi * p))


def trajectory(rng):
    """Twenty steps of float32 training: AdamW, decay on matrices only, clipping at 1, warm-up and cosine."""
    steps, V = 20, CONFIG["vocab_size"]
    stored = random_weights(rng, tied=True, std=0.1)
    first, stride = rng.integers(0, V, (steps, 2, 1)), rng.integers(1, 4, (steps, 2, 1))
    tokens = (first + stride * np.arange(14)) % V  # (steps, 2, 14): counting in strides, which a model can learn
    weights = {name: torch.nn.Parameter(torch.tensor(w.astype(np.float32))) for name, w in stored.items()}
    groups = [
        {"params": [w for w in weights.values() if w.ndim == 2], "weight_decay": 0.01},
        {"params": [w for w in weights.values() if w.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.999), eps=1e-8, foreach=False)
    losses, norms, rates = [], [], [learning_rate(step) for step in range(steps)]
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        batch = torch.tensor(tokens[step])
        optimizer.zero_grad()
        _, loss = llama_loss(weights, batch[:, :-1], batch[:, 1:])
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(weights.values(), 1.0).item())
        optimizer.step()
        losses.append(loss.item())
    options = {"optimizer": "adamw", "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01, "max_grad_norm": 1.0}
    options |= {"learning_rate": 1e-3, "min_learning_rate": 1e-5, "warmup_steps": 5, "decay_steps": steps}
    saved = {"config": json.dumps(CONFIG | {"tie_embeddings": True}), "options": json.dumps(options)}
    saved |= {"ids": tokens[:, :, :-1].astype(np.int32), "labels": tokens[:, :, 1:].astype(np.int32)}
    saved |= {"losses": np.array(losses), "grad_norms": np.array(norms), "learning_rates": np.array(rates)}
    saved |= {f"initial/{name}": w for name, w in stored.items()}
    return saved | {f"final/{name}": w.detach().numpy() for name, w in weights.items()}


# -- the table -----------------------------------------------------------------------------------

TABLE = {  # name of the file: (function, seed)
    "embedding": (embedding, 101),
    "rms_norm": (rms_norm, 102),
    "rope": (rope, 103),
    "swiglu": (swiglu, 104),
    "layer_norm": (layer_norm, 114),
    "gelu": (gelu, 115),
    "dropout": (dropout, 105),
    "optimizers": (optimizers, 106),
    "global_norm": (global_norm, 107),
    "attention": (attention, 108),
    "cross_entropy": (cross_entropy, 109),
    "router": (router, 113),
    "experts": (experts, 114),
    "model_tiny": (model_tiny, 110),
    "model_tiny_untied": (model_tiny_untied, 111),
    "trajectory": (trajectory, 112),
    "muon": (muon, 113),
    "adamw_8bit": (adamw_8bit, 116),
}


def tolerance(name, array):
    """Return (rtol, atol): float32 training on another processor may round differently."""
    loose = name == "trajectory" or array.dtype == np.float32
    return (1e-4, 1e-6) if loose else (1e-10, 1e-12)


def maker(name, function, seed):
    """Return the function that makes the file `name`.npz."""

    def make():
        torch.set_num_threads(1)
        return function(np.random.default_rng(seed)) | meta(seed, f"python tests/golden/make.py {name}", torch, np)

    return make


if __name__ == "__main__":
    main(__doc__, {name: maker(name, *entry) for name, entry in TABLE.items()}, tolerance)
