"""Which storage each tensor of a GGUF file gets, against llama.cpp's rules and the sizes that follow from them."""

import pytest

from abi_py.config import TrainableModelConfig
from abi_py.errors import ConfigError
from abi_py.families import tensor_table
from abi_py.formats.gguf.quantising import FILE_TYPES, Subject, file_type, plan

QWEN_14B = {
    **{"family": "qwen2", "hidden_dim": 5120, "num_layers": 48, "num_heads": 40, "num_kv_heads": 8},
    **{"intermediate_dim": 13824, "vocab_size": 152064, "tie_embeddings": False},
}


def shapes_of(**shape):
    return {t.gguf_name: t.shape for t in tensor_table(TrainableModelConfig(**shape))}


@pytest.mark.parametrize(
    ("name", "gigabytes", "gibibytes", "bits"),
    [
        ("F16", 29.54, 27.51, 16.00),
        ("Q8_0", 15.70, 14.62, 8.50),
        ("Q6_K", 12.12, 11.29, 6.56),
        ("Q5_K_M", 10.50, 9.78, 5.69),
        ("Q4_K_M", 8.98, 8.37, 4.87),
        ("Q4_K_S", 8.57, 7.98, 4.64),
    ],
)
def test_the_sizes_of_qwen_14b_are_those_that_were_published(name, gigabytes, gibibytes, bits):
    planned = plan(shapes_of(**QWEN_14B), Subject("qwen2", 48, 40, 8), file_type(name))
    found = planned.nbytes / 1e9, planned.nbytes / 2**30, planned.bits_per_weight
    assert tuple(round(each, 2) for each in found) == (gigabytes, gibibytes, bits)


def test_which_blocks_get_more_bits():
    planned = plan(shapes_of(**QWEN_14B), Subject("qwen2", 48, 40, 8), file_type("q4_k_m")).storages
    more = [i for i in range(48) if planned[f"blk.{i}.ffn_down.weight"] == "q6_k"]
    assert more == [*range(6), *range(8, 42, 3), *range(42, 48)]
    assert more == [i for i in range(48) if planned[f"blk.{i}.attn_v.weight"] == "q6_k"]
    assert {planned[f"blk.{i}.attn_{part}.weight"] for i in range(48) for part in ("q", "k", "output")} == {"q4_k"}
    assert (planned["output.weight"], planned["token_embd.weight"]) == ("q6_k", "q4_k")
    assert {planned["output_norm.weight"], planned["blk.0.attn_q.bias"]} == {"float32"}
    small = plan(shapes_of(**QWEN_14B), Subject("qwen2", 48, 40, 8), file_type("Q4_K_S")).storages
    assert [i for i in range(48) if small[f"blk.{i}.attn_v.weight"] == "q5_k"] == [*range(4)]
    assert [i for i in range(48) if small[f"blk.{i}.ffn_down.weight"] == "q5_k"] == [*range(6)]


LAYER = {
    **{f"blk.{i}.attn_{part}.weight": (256, 256) for i in range(4) for part in ("q", "k", "v", "output")},
    **{f"blk.{i}.ffn_down.weight": (256, 512) for i in range(4)},
    "token_embd.weight": (99, 256),
}


@pytest.mark.parametrize(
    ("type", "subject", "name", "storage"),
    [
        ("Q8_0", Subject("llama", 4, 4, 4), "token_embd.weight", "q8_0"),  # tied: it is the head
        ("Q4_0", Subject("llama", 4, 4, 4), "token_embd.weight", "q6_k"),
        ("Q4_0", Subject("llama", 4, 4, 4), "blk.0.attn_v.weight", "q4_0"),
        ("Q4_K_M", Subject("llama", 4, 4, 4, experts=8), "blk.1.attn_k.weight", "q8_0"),
        ("Q4_K_M", Subject("llama", 4, 4, 4, experts=8), "blk.1.attn_v.weight", "q8_0"),
        ("Q4_K_M", Subject("llama", 4, 4, 4, experts=8), "blk.1.attn_output.weight", "q5_k"),
        ("Q5_K_M", Subject("llama", 4, 4, 4, experts=8), "blk.1.attn_output.weight", "q5_k"),
        ("Q6_K", Subject("llama", 4, 4, 4, experts=8), "blk.1.attn_output.weight", "q6_k"),
        ("Q4_K_M", Subject("llama", 80, 64, 8), "blk.1.attn_v.weight", "q6_k"),
        ("Q4_K_S", Subject("llama", 80, 64, 64), "blk.3.attn_v.weight", "q5_k"),
        ("Q4_K_M", Subject("llama", 32, 64, 8), "blk.3.attn_v.weight", "q6_k"),
        ("Q2_K", Subject("llama", 4, 4, 4), "blk.3.attn_v.weight", "q3_k"),
        ("Q2_K", Subject("llama", 4, 4, 1), "blk.3.attn_v.weight", "q4_k"),
        ("Q2_K", Subject("llama", 4, 4, 1), "blk.3.attn_q.weight", "q2_k"),
        ("Q3_K_M", Subject("llama", 4, 4, 1), "blk.1.attn_v.weight", "q5_k"),
        ("Q3_K_M", Subject("llama", 4, 4, 1), "blk.2.attn_v.weight", "q4_k"),
        ("Q3_K_L", Subject("llama", 4, 4, 1), "blk.2.attn_output.weight", "q5_k"),
        ("IQ4_NL", Subject("llama", 4, 4, 1), "blk.2.attn_v.weight", "q5_k"),
    ],
)
def test_rules_of_llama_cpp(type, subject, name, storage):
    assert plan(LAYER, subject, file_type(type)).storages[name] == storage


def test_rows_that_are_no_whole_blocks_get_smaller_ones():
    shapes = {f"blk.0.ffn_{part}.weight": (8, columns) for part, columns in (("up", 96), ("gate", 100))}
    shapes["token_embd.weight"] = (8, 96)
    subject = Subject("llama", 1, 1, 1)
    found = {name: plan(shapes, subject, file_type(name)).storages for name in ("Q4_K_S", "Q5_K_S", "Q6_K", "Q8_0")}
    assert [found[name]["blk.0.ffn_up.weight"] for name in found] == ["q5_0", "q5_1", "q8_0", "q8_0"]
    assert {found[name]["blk.0.ffn_gate.weight"] for name in found} == {"float16"}
    assert {found[name]["token_embd.weight"] for name in found} == {"q8_0"}


def test_what_is_never_quantised():
    shapes = {"blk.0.ffn_gate_inp.weight": (8, 256), "position_embd.weight": (64, 256), "output_norm.weight": (256,)}
    for name in FILE_TYPES:
        assert {*plan(shapes, Subject("llama", 1, 1, 1), file_type(name)).storages.values()} == {"float32"}


def test_an_importance_matrix_saves_the_first_blocks():
    planned = plan(LAYER, Subject("llama", 8, 4, 4), file_type("Q4_0"), weighted=True).storages
    assert planned["blk.0.ffn_down.weight"] == "q4_1"
    assert planned["blk.1.ffn_down.weight"] == "q4_0"


def test_a_type_that_is_none():
    assert file_type("q4_k").name == "Q4_K_M"
    with pytest.raises(ConfigError, match=r"quantize \(.Q4_K_X.\) must be F32, F16, .* or Q2_K"):
        file_type("Q4_K_X")
