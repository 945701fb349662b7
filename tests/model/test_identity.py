"""What weights are known by: to the bit by their digest, in any type by their fingerprint."""

import hashlib
import json

import numpy as np
import pytest

from abi_py.config import TrainableModelConfig
from abi_py.errors import CheckpointError
from abi_py.families import tensor_table
from abi_py.model import LoraModel, TrainableModel
from abi_py.model.frozen import FrozenModel, read_frozen
from abi_py.model.identity import Fingerprint, Sample

SHAPE = {
    **{"hidden_dim": 256, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_dim": 256},
    **{"vocab_size": 300, "max_seq_len": 16},
}
FAMILIES = {
    "llama": {},
    "tied": {"tie_embeddings": True},
    "gpt2": {"family": "gpt2", "num_kv_heads": 4, "tie_embeddings": True},
    "gemma3": {"family": "gemma3", "head_dim": 64, "tie_embeddings": True},
    "qwen3_moe": {"family": "qwen3_moe", "head_dim": 64, "num_experts": 4, "norm_topk_prob": True},
}


def fresh(name, seed=1):
    """Return a model of random matrices, whose norms are all alike, as nobody has trained it."""
    return TrainableModel(TrainableModelConfig(**{**SHAPE, **FAMILIES[name], "seed": seed}))


def identity(model):
    return LoraModel(model).identity


@pytest.fixture(scope="module", params=FAMILIES)
def kept(request, tmp_path_factory):
    """Return the places of a model in many types, by these, and one of another seed."""
    root = tmp_path_factory.mktemp(request.param)
    model, other = fresh(request.param), fresh(request.param, seed=2)
    rng = np.random.default_rng(3)
    for entry in tensor_table(model.config):
        if len(entry.shape) == 1:
            model.weights[entry.name] += rng.normal(0, 1e-3, entry.shape)
    model.save_pretrained(root / "float32")
    model.save_pretrained(root / "bfloat16", "bfloat16")
    for kind in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K_M", "Q2_K"):
        model.write_gguf(root / f"{kind}.gguf", kind, check=False)
    other.write_gguf(root / "other-Q4_K_M.gguf", "Q4_K_M", check=False)
    other.write_gguf(root / "other-Q2_K.gguf", "Q2_K", check=False)
    other.save_pretrained(root / "other-bfloat16", "bfloat16")
    return root


def test_the_same_weights_in_other_types(kept):
    """Each beside each, both ways, and none is another seed's: the norms of both are nearly alike."""
    found = {path.stem: identity(read_frozen(path)) for path in sorted(kept.iterdir())}
    same = {name: each for name, each in found.items() if not name.startswith("other")}
    assert same["float32"].digest == same["F32"].digest
    assert same["bfloat16"].digest != same["F16"].digest
    for name, each in same.items():
        for beside, other in same.items():
            if each.digest != other.digest:
                assert each.fingerprint.apart(other.fingerprint) == "", (name, beside)
        for beside in found.keys() - same.keys():
            problem = each.fingerprint.apart(found[beside].fingerprint)
            assert "further off than" in problem or "both are kept in" in problem, (name, beside)
            assert found[beside].fingerprint.apart(each.fingerprint)


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_K_M"])
def test_norms_that_were_trained_are_other_weights(kind, tmp_path):
    """Matrices that a type of few bits hides are no proof: a vector is float32 in any file."""
    model = fresh("llama")
    model.weights["layers.1.ffn_norm"] += np.linspace(0, 0.1, 256, dtype=np.float32)
    here = identity(model).fingerprint
    model.weights["layers.1.ffn_norm"] *= np.float32(1.0001)
    model.write_gguf(tmp_path / "m.gguf", kind, check=False)
    problem = here.apart(identity(read_frozen(tmp_path / "m.gguf")).fingerprint)
    assert problem.startswith("layers.1.ffn_norm, further off than float32 would explain")


def test_a_matrix_that_moved_by_more_than_its_type_explains(tmp_path):
    model = fresh("llama")
    here = identity(model).fingerprint
    w = model.weights["layers.0.w_gate"]
    w += np.random.default_rng(0).normal(0, 0.03 * w.std(), w.shape)
    for kind, apart in (("Q8_0", True), ("Q4_K_M", False)):
        model.write_gguf(tmp_path / "m.gguf", kind, check=False)
        problem = here.apart(identity(read_frozen(tmp_path / "m.gguf")).fingerprint)
        assert problem == ("layers.0.w_gate, further off than float32 and q8_0 would explain" if apart else "")


def test_in_the_same_type_the_digest_decides():
    model = fresh("llama")
    before = identity(model)
    assert before.has(before.digest)
    model.weights["layers.0.w_q"][5, 7] += 1e-3
    after = identity(model)
    assert not after.has(before.digest)
    assert before.fingerprint.apart(after.fingerprint) == "both are kept in float32, and are not the same numbers"


def test_widened_numbers_are_the_same_numbers(tmp_path):
    """And nothing is to be said of them, unlike of rounded ones."""
    fresh("llama").save_pretrained(tmp_path / "m", "bfloat16")
    narrow, wide = read_frozen(tmp_path / "m"), TrainableModel.from_pretrained(tmp_path / "m")
    a, b, c = (identity(each).fingerprint for each in (narrow, wide, fresh("llama")))
    assert (a.apart(b), a.has_numbers_of(b)) == ("", True)
    assert (a.apart(c), a.has_numbers_of(c)) == ("", False)
    assert (a.storages(b), b.storages(a)) == ("bf16", "float32")


def test_of_an_encoded_base_it_is_that_of_its_files(tmp_path):
    fresh("llama").save_pretrained(tmp_path / "m", "bfloat16")
    plain, encoded = (FrozenModel.from_pretrained(tmp_path / "m", storage=storage) for storage in (None, "nf4-dq"))
    assert plain.identity.fingerprint.to_text() == encoded.identity.fingerprint.to_text()


def test_norms_of_gemma_count_as_their_files_keep_them(tmp_path):
    """As 1 + w, which loses the last bits of w; digests of earlier versions, of w, are still known."""
    model = fresh("gemma3")
    model.weights["final_norm"][:] = np.random.default_rng(0).normal(0, 1e-6, 256)
    model.write_gguf(tmp_path / "m.gguf", "F32", check=False)
    back = identity(read_frozen(tmp_path / "m.gguf"))
    assert back.digest == identity(model).digest
    flat = hashlib.sha256(model.collect_weights().tobytes()).hexdigest()
    assert identity(model).has(flat)
    assert not back.has(flat)


def test_a_tied_head_is_the_embedding():
    tied = identity(fresh("tied")).fingerprint
    same = tied.samples["token_embedding"]._replace(storage="q8_0")
    other = same._replace(numbers=-same.numbers)
    for head, said in ((same, ""), (other, "output_proj, further off than float32 and q8_0 would explain")):
        both = Fingerprint({**tied.samples, "output_proj": head})
        assert tied.apart(both) == said


def test_text_and_back():
    here = identity(fresh("qwen3_moe")).fingerprint
    again = Fingerprint.read(here.to_text(), "x")
    assert again.to_text() == here.to_text()
    assert again.has_numbers_of(here)
    assert again.samples.keys() == here.samples.keys()


def packed(numbers, largest):
    """Return a fingerprint of one tensor as text, all of whose numbers are alike."""
    return Fingerprint({"a": Sample("bf16", np.full(8, numbers, "f4"), np.full(4, largest, "f4"))}).to_text()


IMPOSSIBLE = "x: 'a' must have finite numbers, none above the largest of its neighbours"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *((packed(*each), IMPOSSIBLE) for each in ((np.inf, np.inf), (np.nan, 1), (0, np.inf), (0, np.nan), (-2, 1))),
        ("{", "x is not JSON"),
        ("[]", "x: it is [], but must be an object"),
        ('{"a": 3}', "must be"),
        ('{"a": ["bf16"]}', "x: 'a' must be a storage and 12 numbers in base64"),
        ('{"a": ["bf16", "?"]}', "x: 'a' must be a storage and 12 numbers in base64"),
        ('{"a": ["bf16", "AAAA"]}', "x: 'a' must be a storage and 12 numbers in base64"),
        (json.dumps({"a": ["q9", "A" * 64]}), "x: 'a' is in 'q9', a storage not known here"),
    ],
)
def test_a_damaged_fingerprint_is_refused(text, said):
    with pytest.raises(CheckpointError) as error:
        Fingerprint.read(text, "x")
    assert said in str(error.value)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("number", [1e18, 1e22, 1e30, 3e38, np.inf, np.nan])
@pytest.mark.parametrize("storage", ["float32", "bf16", "float16"])
def test_numbers_beyond_every_weight_are_near_to_none(number, storage):
    """Squares of them are beyond float32."""
    here = Sample("float32", np.linspace(-1, 1, 8, dtype=np.float32), np.ones(4, np.float32))
    there = Sample(storage, np.full(8, number, np.float32), np.full(4, number, np.float32))
    assert not here.is_near(there)
    assert not there.is_near(here)
    assert there.is_near(there) == np.isfinite(number)


def test_other_layers_are_named():
    here = identity(fresh("llama")).fingerprint
    less = Fingerprint({name: each for name, each in here.samples.items() if name != "layers.1.w_o"})
    assert here.apart(less) == less.apart(here) == "one of the two has no layers.1.w_o"
