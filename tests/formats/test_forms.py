"""Tensors in the forms in which files keep them: transposed, parts of a fused one, one for each expert."""

import json
from dataclasses import replace

import numpy as np
import pytest

from abi_py.config import LlmTrainingConfig, LoraConfig, TrainableModelConfig
from abi_py.errors import CheckpointError, NonFiniteError
from abi_py.families import FAMILIES, family, write_config
from abi_py.families.llama import FAMILY, NAMES
from abi_py.formats.finite import check_written
from abi_py.formats.forms import from_stored, to_stored
from abi_py.formats.safetensors import Stored, map_safetensors, read_safetensors, write_safetensors
from abi_py.kernels.storage import STORAGES
from abi_py.model import LoraModel, TrainableModel
from abi_py.model.frozen import FrozenModel
from abi_py.parameters import HfName, Tensor
from abi_py.shape import ModelFamily
from abi_py.training.checkpoint import save_checkpoint
from abi_py.training.loading import load_model
from abi_py.training.optimizer import Optimizer
from abi_py.training.resume import restore
from abi_py.training.state import TrainingState

E, F, C = 3, 4, 5
PER_EXPERT = {
    "gate": HfName("m.experts.{e}.w1"),
    "up": HfName("m.experts.{e}.w3"),
    "down": HfName("m.experts.{e}.w2", transposed=True),
}
FUSED = {
    "gate": HfName("m.gate_up", part=(0, 2)),
    "up": HfName("m.gate_up", part=(1, 2)),
    "down": HfName("m.down"),
}
FUSED_TRANSPOSED = {
    "gate": HfName("m.gate_up_t", transposed=True, part=(0, 2)),
    "up": HfName("m.gate_up_t", transposed=True, part=(1, 2)),
    "down": HfName("m.down_t", transposed=True),
}
SHAPES = {"gate": (E, F, C), "up": (E, F, C), "down": (E, C, F)}
EXPECTED = {
    "PER_EXPERT": lambda w: {
        **{f"m.experts.{e}.w1": w["gate"][e] for e in range(E)},
        **{f"m.experts.{e}.w3": w["up"][e] for e in range(E)},
        **{f"m.experts.{e}.w2": w["down"][e].T for e in range(E)},
    },
    "FUSED": lambda w: {"m.gate_up": np.concatenate([w["gate"], w["up"]], axis=1), "m.down": w["down"]},
    "FUSED_TRANSPOSED": lambda w: {
        "m.gate_up_t": np.concatenate([w["gate"], w["up"]], axis=1).swapaxes(1, 2),
        "m.down_t": w["down"].swapaxes(1, 2),
    },
}
KINDS = {"PER_EXPERT": PER_EXPERT, "FUSED": FUSED, "FUSED_TRANSPOSED": FUSED_TRANSPOSED}


def table_of(*kinds):
    """Return the tensors of a block of experts, whose forms are those of the kinds, in this order."""
    return tuple(
        Tensor(name, tuple(KINDS[kind][name] for kind in kinds), name, shape, 0, True) for name, shape in SHAPES.items()
    )


@pytest.fixture
def weights(rng):
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def same(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].shape == array.shape, name
        assert np.array_equal(found[name], array), name


def numbers(from_files):
    copies = {name: np.empty(tensor.shape, np.float32) for name, tensor in from_files.tensors.items()}
    for name, tensor in from_files.tensors.items():
        tensor.copy_to(copies[name])
    return copies


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_what_is_written_and_read(tmp_path, weights, kind, piece, monkeypatch):
    monkeypatch.setattr("abi_py.formats.safetensors.PIECE", piece)
    path = tmp_path / "m.safetensors"
    write_safetensors(path, to_stored(table_of(kind), weights))
    same(read_safetensors(path), EXPECTED[kind](weights))
    stored = map_safetensors(path)
    for kinds in ((kind,), ("FUSED", "PER_EXPERT", "FUSED_TRANSPOSED"), tuple(KINDS)):  # any is read
        found = from_stored(table_of(*kinds), stored, "x", "y")
        same(numbers(found), weights)
        assert set(found.used) == set(stored)
        narrow = {name: Stored(STORAGES["bf16"].encode_ref(t.raw), True) for name, t in stored.items()}
        close = numbers(from_stored(table_of(*kinds), narrow, "x", "y"))
        for name, w in weights.items():
            assert np.array_equal(close[name], STORAGES["bf16"].decode_ref(STORAGES["bf16"].encode_ref(w)))


def test_a_fused_vector(rng):
    table = tuple(Tensor(f"b{k}", (HfName("c_attn.bias", True, (k, 3)),), "", (4,), 0, False) for k in range(3))
    vectors = {f"b{k}": rng.standard_normal(4).astype(np.float32) for k in range(3)}
    (written,) = to_stored(table, vectors).values()
    assert written.shape == (12,)
    assert np.array_equal(np.concatenate(list(written.pieces("b"))).ravel(), np.concatenate(list(vectors.values())))
    stored = {"c_attn.bias": Stored(np.concatenate(list(vectors.values())))}
    same(numbers(from_stored(table, stored, "x", "y")), vectors)


@pytest.mark.parametrize(
    ("kind", "change", "problem"),
    [
        ("PER_EXPERT", {"m.experts.1.w3": None}, r"m\.experts\.1\.w3 is missing"),
        ("PER_EXPERT", {"m.experts.0.w1": None}, r"m\.experts\.0\.w1 is missing"),
        ("PER_EXPERT", {"m.experts.2.w2": np.ones((C, F))}, r"experts\.2\.w2 has shape \(5, 4\) instead of \(4, 5\)"),
        ("PER_EXPERT", {"m.experts.2.w2": np.ones((F, C), np.int8)}, r"experts\.2\.w2 is int8"),
        ("FUSED", {"m.gate_up": np.ones((E, F, C))}, r"gate_up has shape \(3, 4, 5\) instead of \(3, 8, 5\)"),
        ("FUSED", {"m.down": None}, r"m\.experts\.0\.w2 is missing"),
        ("FUSED_TRANSPOSED", {"m.gate_up_t": np.ones((E, 2 * F, C))}, r"\(3, 8, 5\) instead of \(3, 5, 8\)"),
    ],
)
def test_what_does_not_fit_is_named(weights, kind, change, problem):
    content = {name: w for name, w in {**EXPECTED[kind](weights), **change}.items() if w is not None}
    stored = {name: Stored(np.asarray(w)) for name, w in content.items()}
    with pytest.raises(CheckpointError, match=f"^x: .*{problem}"):
        from_stored(table_of("PER_EXPERT", "FUSED", "FUSED_TRANSPOSED"), stored, "x", "y")


def test_an_index_is_that_of_the_file(weights):
    weights["up"][1, 2, 3] = np.nan
    for kind, place in {
        "PER_EXPERT": r"m\.experts\.1\.w3 holds NaN or infinity at \[2, 3\]",
        "FUSED": r"m\.gate_up holds NaN or infinity at \[1, 6, 3\]",
        "FUSED_TRANSPOSED": r"m\.gate_up_t holds NaN or infinity at \[1, 3, 6\]",
    }.items():
        with pytest.raises(NonFiniteError, match=place):
            check_written("x", to_stored(table_of(kind), weights))


def test_a_family_without_all_parts_of_a_tensor_is_told(weights):
    with pytest.raises(RuntimeError, match=r"m\.gate_up has 2 parts"):
        to_stored(table_of("FUSED")[1:], weights)


# -- a whole model of a toy family: Llama with the names and forms of others -----------------------

TOY = {
    **NAMES,
    "token_embedding": ("transformer.wte.weight", ""),
    "layers.{i}.w_o": (HfName("transformer.h.{i}.c_proj.weight", transposed=True), ""),
    "layers.{i}.w_gate": ((HfName("transformer.h.{i}.gate_up", part=(0, 2)), "transformer.h.{i}.gate"), ""),
    "layers.{i}.w_up": ((HfName("transformer.h.{i}.gate_up", part=(1, 2)), "transformer.h.{i}.up"), ""),
    "layers.{i}.w_down": (HfName("transformer.h.{i}.down.weight", transposed=True), ""),
    "output_proj": ("lm_head.weight", ""),
}
SHAPE = {"hidden_dim": 12, "num_layers": 2, "num_heads": 3, "num_kv_heads": 1, "intermediate_dim": 7, "vocab_size": 11}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def toy(request, monkeypatch):
    """Return a model of a family in other forms."""
    made = replace(FAMILY, names=TOY, prefix="transformer.", derived=r"\.attn\.bias$")
    monkeypatch.setitem(FAMILIES, ModelFamily.LLAMA, made)
    model = TrainableModel(TrainableModelConfig(**SHAPE, head_dim=6, tie_embeddings=request.param))
    model.weights["final_norm"] = np.linspace(0.5, 2, 12)
    return model


def write_folder(folder, model, change=None):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(write_config(model.config)))
    tensors = to_stored(model.parameters.table, model.weights)
    write_safetensors(folder / "model.safetensors", tensors)
    if change is not None:
        content = {name: np.array(w) for name, w in read_safetensors(folder / "model.safetensors").items()}
        write_safetensors(folder / "model.safetensors", change(content))
    return folder


def without_prefix(content):
    return {name.removeprefix("transformer."): w for name, w in content.items()}


def apart(content):
    """Return the fused tensors in parts."""
    for name in [name for name in content if name.endswith("gate_up")]:
        gate, up = np.split(content.pop(name), 2)
        content |= {name.replace("gate_up", "gate"): gate, name.replace("gate_up", "up"): up}
    return content


def with_masks(content):
    return content | {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.uint8)}


def as_half(content):
    return {name: w.astype(np.float16) for name, w in content.items()}


@pytest.mark.parametrize("change", [None, without_prefix, apart, with_masks], ids=lambda change: str(change)[:20])
def test_a_model_is_read_in_all_forms(tmp_path, toy, change):
    found = load_model(write_folder(tmp_path / "m", toy, change)).model
    assert found.collect_weights().tobytes() == toy.collect_weights().tobytes()
    names = set(to_stored(toy.parameters.table, toy.weights))
    assert {"transformer.h.1.gate_up", "transformer.h.0.c_proj.weight"} <= names
    assert ("lm_head.weight" in names) is (not toy.config.tie_embeddings)


def test_both_forms_of_a_tensor_are_one_too_many(tmp_path, toy):
    folder = write_folder(tmp_path / "m", toy, lambda content: {**apart(dict(content)), **content})
    with pytest.raises(CheckpointError, match=r"has no place for transformer\.h\.0\.gate, transformer\.h\.0\.up"):
        load_model(folder)


def test_transposed_and_fused_matrices_of_a_frozen_model_stay_narrow(tmp_path, toy):
    folder = write_folder(tmp_path / "m", toy, as_half)
    frozen, plain = load_model(folder, frozen=True).model, load_model(folder).model
    assert isinstance(frozen, FrozenModel)
    assert {w.dtype for w in frozen.base.values() if w.ndim == 2} == {np.dtype(np.float16)}
    assert isinstance(frozen.base["layers.0.w_up"], np.memmap)  # as it lies: a part
    ids = np.arange(10)[None] % 11
    assert frozen.forward(ids).tobytes() == plain.forward(ids).tobytes()
    assert frozen.widened().collect_weights().tobytes() == plain.collect_weights().tobytes()


def test_a_nan_is_named_as_it_is_stored(tmp_path, toy):
    toy.weights["layers.1.w_up"][2, 3] = np.nan
    for change in (None, as_half):
        folder = write_folder(tmp_path / str(change)[:3], toy, change)
        with pytest.raises(CheckpointError, match=r"transformer\.h\.1\.gate_up holds NaN or infinity at \[9, 3\]"):
            load_model(folder, frozen=True)
    toy.weights["layers.1.w_up"][2, 3] = 1

    def large(content):
        content["transformer.h.1.c_proj.weight"] = np.full((18, 12), 1e300)
        return content

    folder = write_folder(tmp_path / "large", toy, large)
    with pytest.raises(CheckpointError, match=r"transformer\.h\.1\.c_proj\.weight holds NaN or infinity at \[0, 0\]"):
        load_model(folder)


def test_checkpoints_and_adapters_of_such_a_model(tmp_path, toy):
    state, optimizer = TrainingState(global_step=3), Optimizer(toy.parameters, LlmTrainingConfig())
    path = save_checkpoint(tmp_path, model=toy, state=state, optimizer=optimizer.moments, sections=toy.sections())
    assert set(read_safetensors(path / "model.safetensors")) == set(to_stored(toy.parameters.table, toy.weights))
    other = TrainableModel(toy.config.replace(seed=5))
    assert other.collect_weights().tobytes() != toy.collect_weights().tobytes()
    restore(other, optimizer, path)
    assert other.collect_weights().tobytes() == toy.collect_weights().tobytes()
    assert load_model(path).model.collect_weights().tobytes() == toy.collect_weights().tobytes()
    lora = LoraModel(toy, LoraConfig(rank=2, target_modules=("q_proj",)))
    names = {tensor.hf_name for tensor in lora.parameters.table}
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names


def test_the_prefix_belongs_to_the_family(toy):
    assert family(toy.config).bare("transformer.h.0.x") == "h.0.x"
    assert family(toy.config).bare("model.x") == "model.x"
