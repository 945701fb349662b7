"""Models in GGUF files: both ways for every family, in every kind of storage, and what is wrong with a file."""

import mmap
import re
from functools import partial

import numpy as np
import pytest
from small_models import make_batch, make_model

from abi_py.data.tokenizer import Tokenizer
from abi_py.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from abi_py.families import tensor_table, write_gguf
from abi_py.formats.gguf import open_gguf
from abi_py.formats.gguf.ggml_types import BY_NAME
from abi_py.formats.gguf.rows import rows_in_file, rows_of_ours
from abi_py.formats.gguf.values import F32, U32
from abi_py.formats.gguf.writing import PlannedTensor
from abi_py.formats.gguf.writing import write_gguf as write_file
from abi_py.gradcheck import check_close
from abi_py.model import LoraModel, TrainableModel
from abi_py.model.frozen import FrozenModel
from abi_py.model.gguf_writing import plan_gguf
from abi_py.runs.models import find_tokenizer_beside
from abi_py.runs.tiny_models import decode_once, tiny_frozen
from abi_py.shape import ModelFamily
from abi_py.training.loading import load_model

SIZES = {"hidden_dim": 64, "intermediate_dim": 96}
FAMILIES = {
    "llama": {},
    "llama, untied, with biases": {"attention_bias": True, "tie_embeddings": False},
    "llama, with another width of a head": {"head_dim": 24},
    "llama, scaled as Llama 3": {"rope_scaling": "llama3:8,original_max_position_embeddings=16", "rope_theta": 5e5},
    "llama, linear": {"rope_scaling": "linear:2"},
    "llama, yarn": {"rope_scaling": "yarn:4,original_max_position_embeddings=8"},
    "mistral": {"family": "mistral", "sliding_window": 32},
    "mixtral": {"family": "mixtral", "num_experts": 4},
    "qwen2": {"family": "qwen2", "norm_eps": 1e-6},
    "qwen3": {"family": "qwen3", "head_dim": 24, "tie_embeddings": False},
    "qwen3_moe": {"family": "qwen3_moe", "norm_topk_prob": True, "expert_dim": 32, "num_experts": 6},
    "gpt2": {"family": "gpt2", "num_kv_heads": 4, "max_seq_len": 32},
    "gemma3": {"family": "gemma3", "head_dim": 24, "num_layers": 7, "sliding_window": 6, "rope_theta": 1e6}
    | {"layer_types": ["sliding_attention"] * 5 + ["full_attention"], "rope_scaling": "linear:8"},
    "gemma3, in another pattern": {"family": "gemma3", "sliding_window": 6}
    | {"layer_types": ["full_attention", "sliding_attention"], "rope_local_theta": 500.0},
    "gemma3, all keys": {"family": "gemma3"},
}


def made(name, size=3.0):
    return make_model(size, **(SIZES | FAMILIES[name]))


def owner(array):
    """Return whose memory an array is a view of."""
    while getattr(array, "base", getattr(array, "obj", None)) is not None:
        array = getattr(array, "base", getattr(array, "obj", None))
    return array


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_of_every_family_comes_back_to_the_bit(name, path, rng):
    model = made(name)
    model.export_to_gguf(path)
    ids = rng.integers(0, 97, (2, 13))
    wanted = model.forward(ids).tobytes()
    back, frozen = TrainableModel.from_gguf(path), FrozenModel.from_gguf(path)
    assert back.forward(ids).tobytes() == frozen.forward(ids).tobytes() == wanted
    assert frozen.num_params() == 0
    same = {"family": back.config.family, "sliding_window": None} if name == "mistral" else {}
    assert back.config == model.config.replace(head_dim=back.config.head_dim, **same)
    assert back.config.resolved_head_dim == model.config.resolved_head_dim


def test_bounds_of_llama_3_that_are_not_its_own(path, rng):
    """Only their ratios can be known from the divisors: 2, 9 and 600 are 1, 4.5 and 300."""
    scaling = "llama3:7,low_freq_factor=2,high_freq_factor=9,original_max_position_embeddings=600"
    model = make_model(2.0, **SIZES, head_dim=64, rope_scaling=scaling)
    model.export_to_gguf(path)
    back = TrainableModel.from_gguf(path)
    found = back.config.rope_scaling
    assert (found.low_freq_factor, found.original_max_position_embeddings) == (1, 300)
    assert found.high_freq_factor == pytest.approx(4.5)
    ids = rng.integers(0, 97, (2, 13))
    check_close(back.forward(ids), model.forward(ids), 1e-5)


@pytest.mark.parametrize(("type", "error"), [("F16", 2e-3), ("BF16", 2e-2), ("Q8_0", 3e-2), ("Q4_K_M", 0.25)])
def test_quantised_models(type, error, path, rng):
    """Logits are those of the decoded weights to the bit, and near those of the model itself."""
    model = make_model(2.0, **SIZES | {"hidden_dim": 256, "intermediate_dim": 256})
    ids, labels = make_batch(rng, model)
    wanted = model.forward(ids)
    planned = plan_gguf(model.config, type)
    model.export_to_gguf(path, type, name="a name")
    file = open_gguf(path)
    assert {name: tensor.kind.storage_name for name, tensor in file.tensors.items()} == planned.storages
    assert sum(tensor.size for tensor in file.tensors.values()) == planned.nbytes
    assert file.metadata["general.name"] == "a name"
    assert file.metadata["general.file_type"] == {"F16": 1, "BF16": 32, "Q8_0": 7, "Q4_K_M": 15}[type]
    frozen, back = FrozenModel.from_gguf(path), TrainableModel.from_gguf(path)
    got = frozen.forward(ids)
    assert got.tobytes() == back.forward(ids).tobytes()
    assert frozen.widened().collect_weights().tobytes() == back.collect_weights().tobytes()
    assert (got - wanted).std() < error * wanted.std()
    assert not (got == wanted).all()
    found = frozen.compute_loss(ids, labels).loss
    assert found == pytest.approx(model.compute_loss(ids, labels).loss, rel=error)


def test_matrices_stay_in_the_file(path):
    model = make_model(2.0, **SIZES | {"hidden_dim": 256, "intermediate_dim": 256, "family": "qwen2"})
    model.export_to_gguf(path, "Q4_K_M")
    frozen = FrozenModel.from_gguf(path)
    assert frozen.storages() == ("q4_k", "q6_k")
    matrices = {tensor.name for tensor in frozen.table if len(tensor.shape) > 1}
    assert {name for name, raw in frozen.base.items() if isinstance(owner(raw), mmap.mmap)} == matrices
    # What is written from it again is the same, byte for byte: nothing is decoded that need not be.
    again = path.with_name("again.gguf")
    frozen.export_to_gguf(again, "Q4_K_M", name="model")
    assert again.read_bytes() == path.read_bytes()


def test_the_rows_of_llama_are_in_the_order_of_its_files(path):
    """Row 2j + s of a head is our row s D/2 + j; and what was permuted is permuted back, of raw blocks too."""
    model = make_model(2.0, **SIZES, attention_bias=True)
    heads, head_dim = model.config.num_heads, model.config.resolved_head_dim
    assert rows_in_file(2, 6).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert rows_in_file(3, 8)[rows_of_ours(3, 8)].tolist() == [*range(24)]
    model.export_to_gguf(path)
    file = open_gguf(path)
    ours, raw = model.weights["layers.1.w_q"], file.tensors["blk.1.attn_q.weight"].raw
    for h, j, s in ((0, 0, 1), (2, 3, 0), (3, 7, 1)):
        assert (raw[h * head_dim + 2 * j + s] == ours[h * head_dim + s * head_dim // 2 + j]).all()
    order = rows_in_file(model.config.num_kv_heads, head_dim)
    assert (file.tensors["blk.0.attn_k.bias"].raw[0] == model.weights["layers.0.b_k"][order]).all()
    assert (file.tensors["blk.0.attn_v.weight"].raw == model.weights["layers.0.w_v"]).all()
    assert heads == 4


def test_norms_of_gemma_are_stored_as_one_and_more(path):
    model = made("gemma3, all keys")
    model.export_to_gguf(path)
    raw = open_gguf(path).tensors["blk.1.post_ffw_norm.weight"].raw[0]
    assert (raw == 1 + model.weights["layers.1.ffn_norm_after"]).all()


def test_adapters_on_a_quantised_file(path, rng):
    """Their gradients are those on the widened weights, and merged they are written."""
    from abi_py.config import LoraConfig

    model = make_model(2.0, **SIZES | {"hidden_dim": 256, "intermediate_dim": 256})
    model.export_to_gguf(path, "Q4_K_M")
    ids, labels = make_batch(rng, model)
    config = LoraConfig(rank=2, target_modules=["q", "v", "down"])
    narrow, wide = (LoraModel(m, config) for m in (FrozenModel.from_gguf(path), TrainableModel.from_gguf(path)))
    flat = rng.standard_normal(narrow.num_params()).astype(np.float32) / 8
    for adapted in (narrow, wide):
        adapted.distribute_weights(flat)
        adapted.train_step(ids, labels)
    check_close(narrow.parameters.gradients_flat, wide.parameters.gradients_flat, 1e-4)
    merged = path.with_name("merged.gguf")
    narrow.export_to_gguf(merged)
    check_close(TrainableModel.from_gguf(merged).forward(ids), narrow.forward(ids), 1e-4)


def test_a_folder_of_a_quantised_file(path, tmp_path, rng):
    """Every form of Hugging Face's tensors, of blocks: plain, transposed and one for each expert."""
    for name in ("llama", "gpt2", "mixtral"):
        made(name).export_to_gguf(path, "Q8_0")
        frozen = FrozenModel.from_gguf(path)
        ids = rng.integers(0, 97, (2, 13))
        frozen.save_pretrained(tmp_path / name)
        back = TrainableModel.from_pretrained(tmp_path / name)
        assert back.forward(ids).tobytes() == frozen.forward(ids).tobytes()


def test_a_file_in_parts(path, rng):
    model = made("qwen3")
    files = model.export_to_gguf(path, "F16", max_shard_size="100KB")
    assert [each.name for each in files] == [f"model-{i + 1:05d}-of-{len(files):05d}.gguf" for i in range(len(files))]
    assert len(files) > 1
    back = TrainableModel.from_gguf(files[-1])
    assert back.config.family.value == "qwen3"


# -- what is wrong with a file ---------------------------------------------------------------------


def _rows(flat, first, last):
    return flat[first:last]


def write(path, model, *, change=None, tensors=None):
    """Write a file, with other metadata, or with other tensors: name -> an array, a type and an array, or None."""
    arrays = {t.gguf_name: ("F32", model.weights[t.name]) for t in tensor_table(model.config)}
    for name, value in (tensors or {}).items():
        arrays[name] = ("F32", value) if isinstance(value, np.ndarray) else value
    planned = []
    for name, kept in arrays.items():
        if kept is not None:
            kind, array = BY_NAME[kept[0]], kept[1]
            flat = array.reshape(-1, array.shape[-1])
            planned.append(PlannedTensor(name=name, shape=array.shape, kind=kind, rows=partial(_rows, flat)))
    metadata = {**write_gguf(model.config), **(change or {})}
    write_file(path, {key: value for key, value in metadata.items() if value is not None}, planned)


CASES = {
    "another architecture": (
        {"general.architecture": "rwkv7"},
        "general.architecture is 'rwkv7'; this version reads llama, qwen2, qwen3, gpt2, qwen3moe or gemma3",
    ),
    "no architecture": ({"general.architecture": None}, "the metadata lack general.architecture; "),
    "a missing key": ({"llama.embedding_length": None}, "the metadata lack llama.embedding_length; "),
    "a key of another type": ({"llama.block_count": "2"}, "llama.block_count is '2', but must be a whole number"),
    "heads of each layer": (
        {"llama.attention.head_count": np.array([4, 4], np.int32)},
        "llama.attention.head_count is ",
    ),
    "a key that nobody knows": (
        {"llama.attention.clamp_kqv": F32(8)},
        "llama.attention.clamp_kqv is 8.0; this version does not know the entry, which may change what the model "
        "computes",
    ),
    "a known key with another value": (
        {"llama.expert_gating_func": U32(2)},
        "llama.expert_gating_func is 2; this version computes only 1",
    ),
    "a part of a head that turns": (
        {"llama.rope.dimension_count": U32(8)},
        "llama.rope.dimension_count is 8; this version computes only 16",
    ),
    "a scaling of RoPE": (
        {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": F32(2)},
        "llama.rope.scaling.type is 'longrope'; this version computes none, linear and yarn",
    ),
    "an absurd shape": (
        {"llama.attention.head_count_kv": U32(3)},
        "num_kv_heads (3) must divide num_heads (4)",
    ),
    "too many blocks": ({"llama.block_count": U32(500)}, "block_count is 500, and the file holds 20 tensors; "),
    "one block too many": ({"llama.block_count": U32(3)}, "blk.2.attn_q.weight is missing; "),
    "one block too few": ({"llama.block_count": U32(1)}, "has no place for blk.1.attn_k.weight, blk.1.attn_norm"),
    "another width": (
        {"llama.feed_forward_length": U32(95)},
        "blk.0.ffn_gate.weight has shape (96, 64) instead of (95, 64)",
    ),
    "another vocabulary": ({"llama.vocab_size": U32(96)}, "llama.vocab_size is 96; this version computes only 97"),
}


@pytest.mark.parametrize("case", CASES)
def test_metadata_that_do_not_fit(case, path):
    change, message = CASES[case]
    write(path, make_model(**SIZES), change=change)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        TrainableModel.from_gguf(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


NEUTRAL = {
    "llama.attention.causal": True,
    "llama.expert_count": U32(0),
    "llama.expert_used_count": U32(0),
    "llama.rope.scaling.type": "none",
    "llama.rope.scaling.factor": F32(8),
    "llama.rope.scaling.finetuned": True,
    "llama.logit_scale": F32(1),
    "llama.attention.sliding_window": U32(0),
    "general.url": "https://example.com",
}
MINIMAL = dict.fromkeys(
    (
        *("llama.attention.key_length", "llama.attention.value_length", "llama.rope.dimension_count"),
        *("llama.rope.freq_base", "llama.vocab_size"),
    )
)


@pytest.mark.parametrize("change", [NEUTRAL, MINIMAL], ids=["with what says nothing", "with what it must say"])
def test_metadata_that_mean_the_same(change, path):
    model = make_model(**SIZES)
    write(path, model, change=change)
    assert FrozenModel.from_gguf(path).config == model.config


def test_tensors_that_do_not_fit(path):
    model = make_model(**SIZES)
    shape = model.weights["layers.0.w_up"].shape
    for change, message in {
        "missing": ({"blk.0.ffn_up.weight": None}, "blk.0.ffn_up.weight is missing; "),
        "extra": ({"blk.0.attn_q.lora": np.ones((2, 2), np.float32)}, "has no place for blk.0.attn_q.lora"),
        "integers": (
            {"blk.0.ffn_up.weight": ("I32", np.ones(shape, np.int32))},
            "blk.0.ffn_up.weight is of type I32, which this version does not compute with",
        ),
        "no embedding": ({"token_embd.weight": None}, "token_embd.weight is missing; it is not the file of a language"),
        "frequencies": (
            {"rope_freqs.weight": np.linspace(1, 2, 8).astype(np.float32) ** 2},
            "rope_freqs.weight divides the frequencies of RoPE otherwise than Llama 3 does",
        ),
        "too many frequencies": ({"rope_freqs.weight": np.ones(9, np.float32)}, "rope_freqs.weight is F32 (9,)"),
    }.values():
        write(path, model, tensors=change)
        with pytest.raises(CheckpointError, match=re.escape(message)):
            FrozenModel.from_gguf(path)
    write(path, model, tensors={"rope_freqs.weight": np.ones(8, np.float32)})  # divides nothing
    assert FrozenModel.from_gguf(path).config == model.config


def test_nan_in_numbers_and_in_scales(path):
    model = make_model(**SIZES)
    for type, at, damage, place in (
        ("F32", 4 * (3 * 64 + 5), np.float32(np.inf), "at [3, 5]"),
        ("Q8_0", 34 * (7 * 2 + 1), np.float16(np.nan), "at [7, 32]"),
    ):
        model.export_to_gguf(path, type)
        tensor = open_gguf(path).tensors["blk.1.ffn_up.weight"]
        with open(path, "r+b") as file:
            file.seek(tensor.offset + at)
            file.write(damage.tobytes())
        for kind in (TrainableModel, FrozenModel):
            message = f"blk.1.ffn_up.weight holds NaN or infinity {place}"
            with pytest.raises(CheckpointError, match=re.escape(message)):
                kind.from_gguf(path)
            kind.from_gguf(path, allow_nonfinite=True)


# -- what cannot be written ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"family": "mistral", "sliding_window": 8}, "sliding_window (8) cannot be written as GGUF: llama.cpp lets"),
        ({"family": "qwen2", "sliding_window": 8}, "sliding_window (8) cannot be written as GGUF"),
        ({"family": "qwen2", "head_dim": 20}, "head_dim (20) cannot be written as GGUF"),
        ({"family": "qwen3", "attention_bias": True}, "attention_bias (True) cannot be written as GGUF"),
        ({"family": "qwen3_moe"}, "norm_topk_prob (False) cannot be written as GGUF"),
        (
            {"family": "qwen3_moe", "norm_topk_prob": True, "decoder_sparse_step": 2},
            "decoder_sparse_step (2) cannot be written as GGUF",
        ),
        (
            {"family": "qwen3_moe", "norm_topk_prob": True, "mlp_only_layers": [0]},
            "mlp_only_layers ((0,)) cannot be written as GGUF",
        ),
        ({"family": "gpt2", "num_kv_heads": 4, "activation": "gelu"}, "activation (gelu) cannot be written as GGUF"),
        ({"family": "gemma3", "query_pre_attn_scalar": 7}, "query_pre_attn_scalar (7) cannot be written as GGUF"),
        ({"rope_scaling": "dynamic:2"}, "rope_scaling (dynamic) cannot be written as GGUF: llama.cpp computes none,"),
        ({"family": "qwen2", "rope_scaling": "llama3:8"}, "rope_scaling (llama3) cannot be written as GGUF"),
        ({"rope_scaling": "yarn:8,beta_fast=16"}, "rope_scaling's beta_fast (16.0) cannot be written as GGUF"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_not_written(shape, message, path):
    model = make_model(**SIZES | shape)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        model.export_to_gguf(path)
    assert str(caught.value).endswith("export a Hugging Face folder")
    assert not path.exists()


def test_weights_that_are_not_finite_are_not_written(path):
    model = make_model(**SIZES)
    model.weights["layers.0.w_up"][2, 3] = np.nan
    with pytest.raises(NonFiniteError, match=r"blk\.0\.ffn_up\.weight: row 2, column 3 is nan"):
        model.export_to_gguf(path)
    model.weights["layers.0.w_up"][2, 3] = 1e6
    with pytest.raises(NonFiniteError, match=r"ffn_up\.weight"):
        model.export_to_gguf(path, "F16")
    assert not path.exists()
    model.export_to_gguf(path, "BF16")


# -- tokenizers, and verbs -------------------------------------------------------------------------


@pytest.fixture
def with_bytes():
    """Return a model that reads bytes, with the tokenizer that is written for other programs."""
    from abi_py.runs.companions import with_bytes as completed

    model = make_model(2.0, **SIZES, vocab_size=257)
    model.companions = completed(model.companions, model.config.max_seq_len)
    return model


def test_the_tokenizer_goes_along_and_comes_back(with_bytes, path, tmp_path):
    with_bytes.export_to_gguf(path, "F16")
    file = open_gguf(path)
    assert file.metadata["tokenizer.ggml.model"] == "gpt2"
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 257
    tokenizer = Tokenizer.load(path)
    text = "Zig, ÿ and 🦎\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    loaded = load_model(path, frozen=True)
    assert loaded.eos_ids == (256,)
    assert find_tokenizer_beside(path, None) is None  # bytes are read as bytes, as beside a folder
    loaded.model.save_pretrained(tmp_path / "folder")
    back = Tokenizer.load(tmp_path / "folder")
    assert back.encode(text) == tokenizer.encode(text) == Tokenizer.load(path).encode(text)


def test_a_model_without_a_tokenizer_says_so(path):
    make_model(**SIZES).export_to_gguf(path)
    assert open_gguf(path).metadata["tokenizer.ggml.model"] == "none"  # llama.cpp asks for an answer
    assert find_tokenizer_beside(path, None) is None
    with pytest.raises(DataError, match="has no tokenizer"):
        Tokenizer.load(path)
    assert load_model(path).model.companions.files == {}


@pytest.mark.parametrize("storage", ["q4_k", "q8_0"])
def test_kernels_are_compiled_with_models_that_have_whole_blocks(storage):
    """`generate`, `chat` and `eval` compile ahead what a quantised model needs."""
    made = tiny_frozen(ModelFamily.LLAMA, storage)
    assert made.storages() == (storage,)
    decode_once([made])
