"""The PyTorch half of bench/shakespeare.py: the same model, weights, batches and schedule, one JSON line an evaluation.

    python bench/peers/torch_shakespeare.py batches.npz SETTINGS INTERVAL
"""

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch_llama import Model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shapes import SHAPES
from worker import first_weights


def rate_of(step, steps, settings):
    """The learning rate of an update (step counts from 0): linear warm-up, then half a cosine."""
    high, low, warm = settings["learning_rate"], settings["min_learning_rate"], settings["warmup_steps"]
    if step < warm:
        return high * (step + 1) / warm
    progress = min(1.0, (step - warm) / (steps - warm))
    return low + (high - low) * (1 + math.cos(math.pi * progress)) / 2


def main():
    """Train, evaluate, print."""
    arrays, settings, interval = np.load(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
    batches, validation = (torch.from_numpy(arrays[name]).long() for name in ("batches", "validation"))
    shape = SHAPES["small"]
    model = Model(shape)
    with torch.no_grad():
        for name, weight in first_weights(shape):
            model.get_parameter(name).copy_(torch.from_numpy(weight))
    decayed = [w for w in model.parameters() if w.ndim == 2]
    others = [w for w in model.parameters() if w.ndim == 1]
    groups = [{"params": decayed, "weight_decay": settings["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    betas = settings["beta1"], settings["beta2"]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=betas, eps=settings["epsilon"], fused=True)
    call, seconds = torch.compile(model), 0.0
    for step, (ids, labels) in enumerate(batches):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = rate_of(step, len(batches), settings)
        optimizer.zero_grad(set_to_none=True)
        call(ids, labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings["max_grad_norm"])
        optimizer.step()
        seconds += time.perf_counter() - began
        if (step + 1) % interval == 0 or step + 1 == len(batches):
            with torch.no_grad():
                loss = sum(model(*pair).item() for pair in validation) / len(validation)
            print(json.dumps({"step": step + 1, "loss": loss, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
