"""Time a training step of LoRA on the same model with transformers, PEFT and PyTorch, and print one JSON line.

    pip install torch==2.13.0 transformers==5.24.0 peft==0.21.2 numpy
    python bench/peers/peft_lora.py --shape tiny --rank 16

As its users run it: LlamaForCausalLM in float32 with fused attention, adapters on all linear layers but the head,
eager; AdamW (fused) over the adapters and clipping at 1.
"""

import importlib.metadata
import sys
from pathlib import Path

import peft
import torch
import transformers
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shapes import SHAPES
from worker import ADAM_EPS, BETA1, BETA2, EPS, MAX_NORM, THETA, batch, first_weights, options_of, print_line, timed

LEARNING_RATE = 1e-4
NAMES = {"w_q": "self_attn.q_proj", "w_k": "self_attn.k_proj", "w_v": "self_attn.v_proj", "w_o": "self_attn.o_proj"}
NAMES |= {"w_gate": "mlp.gate_proj", "w_up": "mlp.up_proj", "w_down": "mlp.down_proj"}
NAMES |= {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def their_name(name):
    """Return transformers' name of a weight."""
    if name == "token_embedding":
        return "model.embed_tokens.weight"
    if name == "final_norm":
        return "model.norm.weight"
    _, layer, own = name.split(".")
    return f"model.layers.{layer}.{NAMES[own]}.weight"


def main():
    """Read the options, time the steps, print the line."""
    rank = {"type": int, "default": 16, "help": "rank of the adapters"}
    options = options_of(__doc__.splitlines()[0], ("--rank", rank), precisions=("fp32",))
    torch.set_num_threads(options.threads)
    shape = SHAPES[options.shape]
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_dim,
        intermediate_size=shape.intermediate_dim,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=shape.seq_len,
        rms_norm_eps=EPS,
        rope_theta=THETA,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in first_weights(shape):
            model.get_parameter(their_name(name)).copy_(torch.from_numpy(weight))
    targets = [name.rpartition(".")[2] for name in NAMES.values() if name.endswith("_proj")]
    wanted = peft.LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=targets, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, wanted)
    trained = [w for w in adapted.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=LEARNING_RATE, betas=(BETA1, BETA2), eps=ADAM_EPS, weight_decay=0.0, fused=True
    )
    ids, labels = (torch.from_numpy(x).long() for x in batch(shape))

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = adapted(input_ids=ids, shift_labels=labels, labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, MAX_NORM)
        optimizer.step()
        return loss.item()

    losses, seconds = timed(step, options)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("peft", "transformers", "torch")]
    print_line("peft", ", ".join(versions), options, losses, seconds, sum(w.numel() for w in trained))


if __name__ == "__main__":
    main()
