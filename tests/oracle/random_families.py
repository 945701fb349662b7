"""Random small models of all families, in transformers and here; how far the two are apart.

    python tests/oracle/random_families.py                 three of each
    python tests/oracle/random_families.py --models 50     more

Head counts, widths, windows, the scaling of RoPE, experts and what is tied are drawn; what is compared is what the
golden files hold (tests/golden/make_families.py), from transformers computing in float64.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "golden"), str(TESTS / "families")]  # scripts there, not packages

ROPE = (
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "dynamic", "factor": 3.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0}
    | {"original_max_position_embeddings": 20},
)
TRAINED = 28  # positions, of RoPE's dynamic scaling: as many as are written
MARKS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def draw(rng, least, most):
    """Return a whole number between two, both included."""
    return int(rng.integers(least, most + 1))


def decoder(rng):
    """Return what the configurations of Llama's relatives share."""
    groups, D = draw(rng, 1, 3), 2 * draw(rng, 2, 8)
    heads = groups * draw(rng, 1, 3)
    width = heads * draw(rng, -(-16 // heads), 42 // heads)
    rope = {**ROPE[draw(rng, 0, len(ROPE) - 1)], "rope_theta": float(rng.choice([100.0, 1000.0, 1e4]))}
    dynamic = rope["rope_type"] == "dynamic"
    return {
        "vocab_size": draw(rng, 41, 97), "hidden_size": width, "intermediate_size": draw(rng, 5, 43),
        "num_hidden_layers": draw(rng, 1, 3), "num_key_value_heads": groups, "head_dim": D,
        "num_attention_heads": heads, "max_position_embeddings": TRAINED if dynamic else 64,
        "rms_norm_eps": float(rng.choice([1e-6, 1e-5, 1e-2])), "tie_word_embeddings": bool(draw(rng, 0, 1)),
        "rope_parameters": rope, **MARKS,
    }  # fmt: skip


def windows(rng):
    """Return the windows of Qwen2 and its successors, of some blocks, all or none.

    Never 1: of that window, transformers' own cache keeps all keys.
    """
    return {
        "use_sliding_window": bool(draw(rng, 0, 1)), "sliding_window": draw(rng, 2, 12),
        "max_window_layers": draw(rng, 0, 2),
    }  # fmt: skip


def window(rng):
    """Return the window of all blocks, or none."""
    return {"sliding_window": draw(rng, 2, 12) if draw(rng, 0, 1) else None}


def experts(rng):
    """Return the experts of a block."""
    top = draw(rng, 1, 4)
    return {"num_local_experts": draw(rng, top + 1, 9), "num_experts_per_tok": top, "router_aux_loss_coef": 0.05}


def gpt2(rng):
    """Return a configuration of GPT-2."""
    H = draw(rng, 1, 5)
    return {
        "vocab_size": draw(rng, 41, 97), "n_embd": H * draw(rng, 5, 11), "n_head": H, "n_layer": draw(rng, 1, 3),
        "n_inner": draw(rng, 5, 43), "n_positions": 64, "layer_norm_epsilon": float(rng.choice([1e-5, 1e-2])),
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "tie_word_embeddings": bool(draw(rng, 0, 1)), **MARKS,
    }  # fmt: skip


def gemma3(rng):
    """Return a configuration of Gemma 3; transformers asks for a window even where no block has it."""
    drawn = decoder(rng)
    local = {"rope_type": "default", "rope_theta": float(rng.choice([30.0, 300.0]))}
    kinds = ["sliding_attention", "full_attention"]
    return drawn | {
        "query_pre_attn_scalar": draw(rng, 4, 20), "sliding_window": draw(rng, 2, 12),
        "layer_types": rng.choice(kinds, drawn["num_hidden_layers"]).tolist(),
        "rope_parameters": {"full_attention": drawn["rope_parameters"], "sliding_attention": local},
        "attention_bias": bool(draw(rng, 0, 1)),
    }  # fmt: skip


FAMILIES = {
    "llama": ("LlamaConfig", decoder),
    "mistral": ("MistralConfig", lambda rng: decoder(rng) | {"sliding_window": draw(rng, 2, 12)}),
    "qwen2": ("Qwen2Config", lambda rng: decoder(rng) | windows(rng)),
    "qwen3": ("Qwen3Config", lambda rng: decoder(rng) | windows(rng)),
    "gpt2": ("GPT2Config", gpt2),
    "gemma3": ("Gemma3TextConfig", gemma3),
    "mixtral": ("MixtralConfig", lambda rng: decoder(rng) | experts(rng) | window(rng)),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        lambda rng: (
            decoder(rng)
            | experts(rng)
            | {"use_sliding_window": bool(draw(rng, 0, 1)), "sliding_window": draw(rng, 2, 12)}
            | {"attention_bias": bool(draw(rng, 0, 1))}
            | {"moe_intermediate_size": draw(rng, 5, 23), "norm_topk_prob": bool(draw(rng, 0, 1))}
        ),
    ),
}


def random_figures(family, number, folder):
    """Return the figures of a random model, and its configuration as transformers takes it."""
    import make_families as golden
    from golden_figures import Figures

    kind, fields = FAMILIES[family]
    chosen = fields(np.random.default_rng((list(FAMILIES).index(family), number)))
    dynamic = chosen.get("max_position_embeddings") == TRAINED
    rows = ((TRAINED + 9,), (TRAINED + 9,)) if dynamic else (golden.LONG, golden.ROWS)[number % 2]
    for seed in range(1000 * number, 1000 * number + 200):
        case = golden.Case(kind, chosen, seed, rows, spread=0.5 if family == "gpt2" else 0.28, epsilon=golden.QUIET)
        try:
            return Figures({name: np.asarray(value) for name, value in golden.figures(case).items()}, folder), chosen
        except golden.Unsuitable:
            continue
    raise RuntimeError(f"{family} {number}: from no seed comes a text that shows something: {chosen}")


def main():
    """Print the largest differences of each family."""
    import transformers
    from golden_figures import print_table

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=3, help="of each family")
    parser.add_argument("--family", action="append", choices=list(FAMILIES), help="repeat the flag for each")
    options = parser.parse_args()

    def rows():
        for family in options.family or FAMILIES:
            found = []
            for number in range(options.models):
                with tempfile.TemporaryDirectory() as folder:
                    found.append(random_figures(family, number, Path(folder))[0].largest())
            yield family, np.max(found, axis=0)

    print_table(rows())


if __name__ == "__main__":
    main()
