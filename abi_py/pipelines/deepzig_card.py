"""The model card of a DeepZig run: README.md in its folder."""

import math
import textwrap
from collections.abc import Mapping
from pathlib import Path

from ..config import LossOn
from ..formats.zig import misfit
from ..training.report import EvalResult, TrainingReport
from .deepzig_run import DeepZigRun

__all__ = ["model_card"]


def model_card(run: DeepZigRun, num_params: int, report: TrainingReport, results: Mapping[str, EvalResult]) -> str:
    """Return the text of README.md: what the model is, what it was trained on and how well, and how to use it."""
    name, shape = run.directory.resolve().name, run.shape
    family = shape.family.value
    rows = {
        "architecture": "Llama: RMSNorm, RoPE, SwiGLU" if family == "llama" else family,
        "embedding and head": "one matrix" if shape.tie_embeddings else "two matrices",
        "layers, width, heads": f"{shape.num_layers}, {shape.hidden_dim}, {shape.num_heads} "
        f"({shape.num_kv_heads} for keys)",
        "feed-forward width": f"{shape.intermediate_dim:,}",
        "vocabulary, context": f"{run.tokenizer.vocab_size:,}, {shape.max_seq_len:,}",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""---
library_name: abi_py
pipeline_tag: text-generation
tags: [deepzig, conversational, {family}]
---

# {name}

A conversational model of {num_params:,} weights, trained on a CPU with abi_py.

| | |
|---|---|
{table}

## Use

```bash
abi-train chat {name} --once "Hello"
```

{_wrapped(_USE + (_USE_LLAMA if misfit(shape) is None else _USE_OTHER))}

## Training

{_wrapped(_training(run, report, results))}

## Limits

{_wrapped(_LIMITS)}
"""


def _training(run: DeepZigRun, report: TrainingReport, results: Mapping[str, EvalResult]) -> str:
    config, training = run.config, run.training
    sources = ", ".join(f"{rows:,} from {_short(source)}" for source, rows in run.selection.sources.items())
    held_out = len(run.held_out.kept)
    kept = f"{held_out:,} of them kept for evaluation" if held_out else "all of them trained on"
    origin = f"Training went on from {_short(config.base)}." if config.base else "Training began with random weights."
    if config.use_lora:
        origin += (
            f" Only adapters of rank {config.lora_rank} were trained; they are in `adapter/` in PEFT's layout, and "
            "merged into `model.safetensors`."
        )
    result = f"training loss {report.final_loss:.4f} at the last step"
    if math.isfinite(report.best_val_loss):
        result += f"; these weights are those of the best evaluation loss, {report.best_val_loss:.4f}"
    for name, figures in results.items():
        result += (
            f". {_PARTS[name].format(len(run.parts[name]))}: loss {figures.loss:.4f}, perplexity "
            f"{figures.perplexity:.2f}, {100 * figures.accuracy:.1f}% of the tokens right"
        )
    trained = "the answers" if config.loss_on is LossOn.ASSISTANT else "all tokens"
    return (
        f"{len(run.selection.conversations):,} conversations ({sources}), {kept}. {origin} {training.epochs} epochs, "
        f"{report.total_steps:,} steps of {training.batch_size * training.grad_accum_steps} conversations, learning "
        f"rate {training.learning_rate:g} along a cosine to 0, loss on {trained}. The end: {result}. "
        "`training_args.json` has every setting, `trainer_state.json` the course of the losses."
    )


_PARTS = {
    "told": "On {} conversations that ask in other words for answers of the training part",
    "new": "On {} conversations whose answers are not in the training part",
}
_USE = (
    "The text of a conversation is that of the chat template in `tokenizer_config.json`; an answer ends with one of "
    "the `eos_token_id` in `generation_config.json`. "
)
_USE_OTHER = "Hugging Face's `AutoModelForCausalLM` reads the folder as it is."
_USE_LLAMA = (
    "`config.json` and the tensor names are those of a Llama model, with `lm_head.weight` written out, so Hugging "
    "Face's `LlamaForCausalLM` reads the folder when `model_type` in `config.json` is changed to `llama`."
)
_LIMITS = (
    "The model knows what its conversations say and little else. Of few conversations it learns the answers by heart; "
    "to a question that is far from all of them it writes something that only looks like an answer. It can be wrong "
    "about anything: check what it says. A tool that it calls is run by nobody unless your program does, and what it "
    "writes after the call is not the tool's result."
)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 110, break_long_words=False, break_on_hyphens=False)


def _short(source: str) -> str:
    """Return the last name of a path: the folder may be given away, and its way there is nobody's business."""
    return Path(source).name
