"""Experts of a FrozenModel, which stay as they lie: bits of the widened model, adapters, replay, memory."""

import threading
import tracemalloc

import numpy as np
import pytest
from small_models import make_batch, make_model

from abi_py.config import LoraConfig
from abi_py.formats.gguf import open_gguf
from abi_py.formats.safetensors import Stack, Stored
from abi_py.generation.decoder import Decoder
from abi_py.gradcheck import check_close
from abi_py.kernels.engine.replay import python_alone
from abi_py.kernels.storage import STORAGES
from abi_py.model import LoraModel, TrainableModel
from abi_py.model.frozen import FrozenModel, frozen_bytes
from abi_py.model.layers import expert_products
from abi_py.model.layers.experts import Experts
from abi_py.runs.export_source import Source
from abi_py.runs.exporting import export
from abi_py.runs.tiny_models import stored_as
from abi_py.training.loading import load_model

EXPERTS = "layers.0.experts_gate"
SHAPE = {"family": "qwen3_moe", "norm_topk_prob": True, "hidden_dim": 64, "num_experts": 6, "experts_per_token": 2}
SHAPE |= {"intermediate_dim": 64, "expert_dim": 544}  # deeper than a slice of a product's sum


def made(**changes):
    """Return a model whose routers send tokens to different experts."""
    model = make_model(3.0, **SHAPE | changes)
    for name, w in model.weights.items():
        if name.endswith("w_router"):
            w *= 20
    return model


def stacked(model, storage_of):
    """Return the model with matrices in two storages, and a stored matrix for each expert."""
    tensors = {}
    for name, w in model.weights.items():
        if w.ndim == 3:
            tensors[name] = Stack(tuple(half(each, storage_of(e)) for e, each in enumerate(w)))
        else:
            tensors[name] = half(w, "bf16") if w.ndim == 2 else Stored(w)
    return FrozenModel(model.config, tensors)


def half(w, storage):
    return Stored(STORAGES[storage].encode_ref(w), storage == "bf16")


KINDS = {
    "Q8_0": lambda model: stored_as(model, "q8_0"),
    "bfloat16": lambda model: stored_as(model, "bf16"),
    "one by one": lambda model: stacked(model, lambda e: "float16"),
    "one by one, in either half": lambda model: stacked(model, lambda e: ("bf16", "float16")[e % 2]),
}


@pytest.fixture(params=KINDS, scope="module")
def both(request):
    """Return a FrozenModel and the same model in float32."""
    frozen = KINDS[request.param](made())
    assert all(isinstance(each.products, expert_products.StoredExperts) for each in frozen.layers[2:-1:2])
    return frozen, frozen.widened()


def decoded(model, ids, prompt=3, *, integer=False):
    """Return the logits after the prompt, and after each token that follows."""
    decoder = Decoder(model, integer=integer)
    found = [decoder.prefill(0, ids[:prompt]).copy()]
    for i in range(prompt, len(ids)):
        found.append(decoder.step(np.zeros(1, int), ids[i : i + 1])[0].copy())
    return np.array(found)


# -- numbers ---------------------------------------------------------------------------------------


def test_losses_and_logits_have_the_bits_of_the_widened_model(both, rng, monkeypatch):
    frozen, plain = both
    ids, labels = make_batch(rng, plain)
    wanted, lost = plain.forward(ids), plain.compute_loss(ids, labels)
    loads = plain.stack.branches[1].routing.loads()
    assert (loads[0] > 0).sum() > 2  # several experts have rows
    assert frozen.forward(ids).tobytes() == wanted.tobytes()
    assert frozen.compute_loss(ids, labels).token_losses.tobytes() == lost.token_losses.tobytes()
    assert frozen.stack.branches[1].routing.loads().tobytes() == loads.tobytes()
    narrow = [m.compute_loss(ids, labels, precision="bf16").loss for m in both]
    assert narrow[0] == pytest.approx(narrow[1], rel=1e-5)  # another order of sums where there is AMX
    monkeypatch.setattr(expert_products, "ROWS", 3)  # an expert's rows in pieces
    assert frozen.forward(ids).tobytes() == wanted.tobytes()


def test_a_text_has_its_logits_alone_and_on_one_thread(both, same_bits, rng):
    frozen, _ = both
    ids = rng.integers(0, 97, (3, 13))
    same_bits(lambda: frozen.forward(ids))
    assert frozen.forward(ids[1:2]).tobytes() == frozen.forward(ids)[1:2].tobytes()


def test_decoding_has_the_bits_of_the_widened_model(both, rng):
    """In steps that are replayed."""
    ids = rng.integers(0, 97, 12).astype(np.int32)
    got, wanted = (decoded(model, ids) for model in both)
    assert got.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("integer", [False, True], ids=["as numbers", "as whole numbers"])
def test_a_text_beside_another_is_written_as_alone(both, integer, rng):
    frozen, plain = both
    ids = rng.integers(0, 97, 12).astype(np.int32)
    wanted = decoded(frozen, ids, integer=integer)
    assert decoded(frozen, ids, prompt=9, integer=integer).tobytes() == wanted[6:].tobytes()
    decoder = Decoder(frozen, 2, integer=integer)
    decoder.prefill(0, ids[3:9])
    assert decoder.prefill(1, ids[:3]).tobytes() == wanted[0].tobytes()
    got = decoder.step(np.arange(2), np.array([5, ids[3]], np.int32))
    assert got[1].tobytes() == wanted[1].tobytes()
    rounded = integer and frozen.storages() == ("q8_0",)
    assert (wanted.tobytes() != decoded(plain, ids).tobytes()) == rounded
    assert np.abs(wanted - decoded(plain, ids)).std() < 0.05 * wanted.std()


def test_adapters_are_those_on_the_widened_model(both, rng):
    ids, labels = make_batch(rng, both[1])
    loras = [LoraModel(model, LoraConfig(rank=3)) for model in both]
    flat = rng.standard_normal(loras[0].num_params()).astype(np.float32) / 8
    for lora in loras:
        lora.distribute_weights(flat)
    got, wanted = (lora.compute_loss(ids, labels, backward=True) for lora in loras)
    assert got.loss == wanted.loss
    assert got.penalties == wanted.penalties
    check_close(loras[0].parameters.gradients_flat, loras[1].parameters.gradients_flat, 1e-5)  # other order of sums
    assert loras[0].merged().collect_weights().tobytes() == loras[1].merged().collect_weights().tobytes()
    plan, widened = (lora.memory_plan(2, 13) for lora in loras)
    assert plan["weights"] < 0.6 * widened["weights"]
    assert {**plan, "weights": 0} == {**widened, "weights": 0}


def test_passes_that_are_replayed_choose_anew(both, rng):
    """The third pass of a kind is replayed; its tokens go to other experts than those of the pass that was noted."""
    lora, other = (LoraModel(both[0], LoraConfig(rank=2)) for _ in range(2))
    for number in range(4):
        ids, labels = make_batch(rng, both[1], ignored=0)
        out = lora.compute_loss(ids, labels, backward=True)
        with python_alone():
            wanted = other.compute_loss(ids, labels, backward=True)
        assert out.loss == wanted.loss, number
        assert lora.parameters.gradients_flat.tobytes() == other.parameters.gradients_flat.tobytes()
        for each in (lora, other):
            each.zero_gradients()


# -- what is read, and what it takes ---------------------------------------------------------------


def test_an_expert_that_is_not_chosen_is_not_read(rng):
    model = made()
    model.weights["token_embedding"][:, 2] = 2.0
    for layer in model.layers:
        if isinstance(layer, Experts):
            model.weights[layer.at + "w_router"][...] = 0
            model.weights[layer.at + "w_router"][[4, 1], 2] = 1.0, 0.5
            for matrix in expert_matrices(model, layer):
                matrix[[0, 2, 3, 5]] = np.nan
    frozen = stored_as(model, "bf16")
    ids = rng.integers(0, 97, 9).astype(np.int32)
    assert np.isfinite(frozen.forward(ids[None])).all()
    assert np.isfinite(decoded(frozen, ids)).all()


def expert_matrices(model, layer):
    return [model.weights[layer.at + name] for name in ("experts_gate", "experts_up", "experts_down")]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_folder_stays_in_its_files(dtype, tmp_path, rng):
    made().save_pretrained(tmp_path / "m", dtype=dtype)
    frozen, plain = (load_model(tmp_path / "m", frozen=frozen).model for frozen in (True, False))
    assert isinstance(frozen, FrozenModel)
    experts = [w for name, w in frozen.base.items() if ".experts_" in name]
    assert len(experts) == 2 * 3 * 6
    assert all(isinstance(w, np.memmap) for w in experts)
    assert sum(w.nbytes for w in frozen.base.values()) == frozen_bytes(tmp_path / "m", frozen.config)
    assert f"0 of {plain.num_params():,} parameters trained" in repr(frozen)
    ids = rng.integers(0, 97, (2, 13))
    assert frozen.forward(ids).tobytes() == plain.forward(ids).tobytes()
    # Written again, in either form, it is what it was.
    frozen.save_pretrained(tmp_path / "again", dtype=dtype)
    content = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("m", "again")]
    assert content[0] == content[1]
    kind = {"bfloat16": "BF16", "float16": "F16"}[dtype]
    frozen.export_to_gguf(tmp_path / "a.gguf", kind, name="m")
    plain.export_to_gguf(tmp_path / "b.gguf", kind, name="m")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_a_quantised_file_is_never_expanded(tmp_path, rng):
    """Beside the file, which is mapped, all that is made to load it, to read a text and to write one is far smaller."""
    sizes = {"hidden_dim": 256, "expert_dim": 256, "intermediate_dim": 256, "num_experts": 32, "vocab_size": 97}
    path = tmp_path / "m.gguf"
    made(**sizes).export_to_gguf(path, "Q8_0")
    size = sum(tensor.size for tensor in open_gguf(path).tensors.values())
    ids = rng.integers(0, 97, 32).astype(np.int32)
    found = {}

    def run(name):
        model = FrozenModel.from_gguf(path)
        found[name] = model.forward(ids[None]), decoded(model, ids[:8])

    run("compiled")  # what is compiled takes memory too
    tracemalloc.start()
    try:
        thread = threading.Thread(target=run, args=("measured",))  # which has no scratch yet
        thread.start()
        thread.join()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    for got, wanted in zip(found["measured"], found["compiled"], strict=True):
        assert got.tobytes() == wanted.tobytes()
    assert size + peak < 1.5 * size, peak / size
    frozen = FrozenModel.from_gguf(path)
    planned = frozen_bytes(path, frozen.config)
    assert planned == sum(w.nbytes for w in frozen.base.values())
    assert planned == pytest.approx(size, rel=0.01)
    assert 4 * TrainableModel.from_gguf(path).num_params() > 3.7 * size  # what it would be as float32


def test_adapters_are_merged_in_the_memory_of_a_tensor(tmp_path):
    """Of a folder in float32, with a tensor for each expert: opened, merged, written, and its logits compared."""
    base = made(expert_dim=512, intermediate_dim=512, num_layers=6, hidden_dim=128, num_experts=16)
    base.save_pretrained(tmp_path / "base")
    lora = LoraModel(base, LoraConfig(rank=2))
    lora.parameters.weights_flat[:] = 0.01
    lora.save(tmp_path / "adapter", str(tmp_path / "base"))
    source = Source.open(tmp_path / "adapter", adapters=True)  # compiles what it calls
    assert export(source, tmp_path / "a", "hf").agreement.off < 1e-4
    whole, stack = (sum(w.nbytes for w in weights) for weights in (base.weights.values(), [base.weights[EXPERTS]]))
    del source
    tracemalloc.start()
    export(Source.open(tmp_path / "adapter", adapters=True), tmp_path / "b", "hf")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * stack < whole / 5
    assert load_model(tmp_path / "b").model.collect_weights().tobytes() == lora.merged().collect_weights().tobytes()
