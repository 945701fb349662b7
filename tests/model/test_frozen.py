"""FrozenModel: folders in bfloat16 and float16 as they lie, the bits of the widened model, and adapters on them."""

import json

import numpy as np
import pytest
from small_models import make_batch, make_model

from abi_py.config import LoraConfig
from abi_py.errors import CheckpointError
from abi_py.families import write_config
from abi_py.formats.encoded import kept_as
from abi_py.formats.safetensors import Stored
from abi_py.generation.decoder import Decoder
from abi_py.gradcheck import check_close
from abi_py.kernels.storage import STORAGES
from abi_py.model import LoraModel
from abi_py.model.frozen import FrozenModel
from abi_py.training.loading import load_model

CODES = {"bf16": "BF16", "float16": "F16", "float32": "F32"}


def write_folder(folder, model, storage_of):
    """Write a model's folder, each matrix in the storage that `storage_of(name)` names, vectors in that of the norm."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(write_config(model.config)))
    entries, pieces, offset = {}, [], 0
    for tensor in model.parameters.table:
        name = storage_of(tensor.name)
        w = model.weights[tensor.name]
        raw = STORAGES[name].encode_ref(w.reshape(len(w), -1))
        end = offset + raw.nbytes
        entries[tensor.hf_name] = {"dtype": CODES[name], "shape": list(w.shape), "data_offsets": [offset, end]}
        pieces.append(raw.tobytes())
        offset = end
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"".join(pieces))
    return folder


LAYOUTS = {
    "bf16": lambda name: "bf16",
    "float16": lambda name: "float16",
    "v in another storage than q and k": lambda name: "float16" if name.endswith(("w_v", "w_down")) else "bf16",
    "float32 but for the embedding": lambda name: "bf16" if name == "token_embedding" else "float32",
}


@pytest.fixture(params=LAYOUTS, scope="module")
def both(request, tmp_path_factory):
    """Return a folder's FrozenModel and its TrainableModel."""
    options = {"tie_embeddings": request.param != "float16"}
    if request.param == "bf16":
        options["family"] = "qwen2"
    folder = write_folder(tmp_path_factory.mktemp("folder") / "m", make_model(4.0, **options), LAYOUTS[request.param])
    return load_model(folder, frozen=True).model, load_model(folder).model


def test_weights_stay_as_they_lie(both):
    frozen, plain = both
    assert isinstance(frozen, FrozenModel)
    assert frozen.num_params() == 0
    assert set(frozen.base) == set(plain.weights)
    narrow = [w for w in frozen.base.values() if w.dtype != np.float32]
    assert narrow
    assert all(isinstance(w, np.memmap) and not w.flags.writeable for w in narrow)
    assert frozen.widened().collect_weights().tobytes() == plain.collect_weights().tobytes()
    for layer in frozen.layers:
        assert not layer.is_trained()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_losses_and_logits_have_the_bits_of_the_widened_model(both, rng, precision):
    frozen, plain = both
    ids, labels = make_batch(rng, plain)
    got, expected = (m.compute_loss(ids, labels, precision=precision) for m in both)
    assert got.token_losses.tobytes() == expected.token_losses.tobytes()
    assert got.num_correct == expected.num_correct
    assert frozen.forward(ids).tobytes() == plain.forward(ids).tobytes()


def test_decoding_has_the_bits_of_the_widened_model(both, rng):
    ids = rng.integers(0, 97, 12).astype(np.int32)
    decoders = [Decoder(model) for model in both]
    got, expected = (
        [d.prefill(0, ids[:9]).copy(), *(d.step(np.zeros(1, int), ids[i : i + 1])[0].copy() for i in (9, 10))]
        for d in decoders
    )
    for one, other in zip(got, expected, strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_adapters_are_those_on_the_widened_model(both, rng, dropout):
    ids, labels = make_batch(rng, both[1])
    loras = [LoraModel(model, LoraConfig(rank=3, dropout=dropout)) for model in both]
    for lora in loras:
        for number, (name, w) in enumerate(lora.weights.items()):
            if name.endswith(".b"):
                w[...] = 0.1 * np.random.default_rng(number).standard_normal(w.shape)
        lora.zero_gradients()
    got, expected = (lora.compute_loss(ids, labels, backward=True) for lora in loras)
    assert got.loss == expected.loss
    check_close(loras[0].parameters.gradients_flat, loras[1].parameters.gradients_flat, 1e-5)  # other order of sums
    assert loras[0].merged().collect_weights().tobytes() == loras[1].merged().collect_weights().tobytes()
    assert loras[0].report() == loras[1].report()
    plan, widened = (lora.memory_plan(2, 13) for lora in loras)
    assert plan["weights"] < widened["weights"]
    assert {**plan, "weights": 0} == {**widened, "weights": 0}
    with pytest.raises(RuntimeError, match=r"only read; merged\(\) returns a copy"):
        loras[0].merge()


def test_adapters_decode_without_a_merged_copy(both, rng):
    frozen, _ = both
    lora, copy = (LoraModel(model, LoraConfig(rank=3)) for model in both)
    for each in (lora, copy):
        for number, (name, w) in enumerate(each.weights.items()):
            if name.endswith(".b"):
                w[...] = 0.1 * np.random.default_rng(number).standard_normal(w.shape)
    ids = rng.integers(0, 97, 9).astype(np.int32)
    assert lora.for_decoding() is lora
    logits = Decoder(lora).prefill(0, ids)
    assert np.abs(logits - copy.forward(ids[None])[0, -1]).max() < 1e-4
    decoder = Decoder(lora)
    decoder.prefill(0, ids[:-1])
    assert np.abs(decoder.step(np.zeros(1, int), ids[-1:])[0] - logits).max() < 1e-4
    assert np.abs(logits - frozen.forward(ids[None])[0, -1]).max() > 1e-3  # the adapters are there


@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("adapters", ["none", "LoRA", "DoRA"])
def test_a_token_has_the_bits_that_it_has_in_a_prompt_in_mixed_storages(rng, adapters, integer, same_bits):
    """As Q4_K_M has them: the matrices of a layer that read the same row are one call for a token, and none in a prompt
    of three and more; adapters on one of those matrices."""
    width = {"hidden_dim": 256, "num_heads": 4, "num_kv_heads": 2, "intermediate_dim": 256, "num_layers": 2}
    plain, kept = make_model(4.0, **width), {}
    for name, w in plain.weights.items():
        kept[name] = Stored(w)
        if w.ndim > 1:
            keep = STORAGES["q6_k" if name.endswith("w_v") else "float16" if name.endswith("w_up") else "q4_k"]
            kept[name] = kept_as(keep, keep.encode_ref(w.reshape(-1, w.shape[-1])), w.shape)
    model = FrozenModel(plain.config, kept)
    if adapters != "none":
        targets = "k_proj", "up_proj"
        model = LoraModel(model, LoraConfig(rank=3, target_modules=targets, use_dora=adapters == "DoRA"))
        for number, w in enumerate(model.weights.values()):
            w += np.float32(0.1) * np.random.default_rng(number).standard_normal(w.shape).astype(np.float32)
    ids = rng.integers(0, 97, 9).astype(np.int32)
    whole = Decoder(model, integer=integer).prefill(0, ids).copy()

    def step():
        decoder = Decoder(model, integer=integer)
        decoder.prefill(0, ids[:5])
        for i in range(5, 9):  # the last ones replayed
            found = decoder.step(np.zeros(1, int), ids[i : i + 1])[0].copy()
        return found

    same_bits(step)
    assert step().tobytes() == whole.tobytes()


def test_nothing_is_trained_without_adapters(both, rng):
    ids, labels = make_batch(rng, both[1])
    with pytest.raises(RuntimeError, match="nothing of a FrozenModel is trained"):
        both[0].compute_loss(ids, labels, backward=True)


def test_a_folder_in_float32_is_trainable_and_nan_is_found(tmp_path):
    model = make_model(4.0)
    folder = write_folder(tmp_path / "a", model, lambda name: "float32")
    assert load_model(folder, frozen=True).model.collect_weights().tobytes() == model.collect_weights().tobytes()
    model.weights["layers.1.w_o"][3, 2] = np.nan
    folder = write_folder(tmp_path / "b", model, lambda name: "bf16")
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.self_attn\.o_proj\.weight holds NaN or infinity at \[3, 2\]"
    ):
        load_model(folder, frozen=True)
    assert isinstance(load_model(folder, frozen=True, allow_nonfinite=True).model, FrozenModel)


def test_float32_matrices_of_a_file_are_mapped_and_those_in_memory_are_copied(tmp_path, rng):
    model = make_model()
    ids, targets = make_batch(rng, model)[:2]
    model.save_pretrained(tmp_path / "m")
    frozen = FrozenModel.from_pretrained(tmp_path / "m")
    matrices = [w for w in frozen.base.values() if w.ndim > 1]
    assert matrices
    assert all(isinstance(w, np.memmap) and not w.flags.writeable for w in matrices)
    assert frozen.forward(ids).tobytes() == model.forward(ids).tobytes()
    one, other = (LoraModel(each, LoraConfig(rank=2)) for each in (frozen, model))
    losses = [each.compute_loss(ids, targets, backward=True).loss for each in (one, other)]
    assert losses[0] == losses[1]
    check_close(one.parameters.gradients_flat, other.parameters.gradients_flat, 1e-5)
    own = FrozenModel(model.config, {name: Stored(w) for name, w in model.weights.items()})
    assert not any(np.shares_memory(w, model.parameters.weights_flat) for w in own.base.values())


def test_weights_without_a_config_json_are_told_so(tmp_path):
    folder = write_folder(tmp_path / "a", make_model(4.0), lambda name: "bf16")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has weights but no config\.json, the shape of its model"):
        load_model(folder)
