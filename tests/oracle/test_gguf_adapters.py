"""Our adapters in llama.cpp, on the GGUF file of their model: as `llama-cli --lora` puts them there."""

import ctypes

import numpy as np
import pytest

from abi_py.config import LoraConfig, TrainableModelConfig
from abi_py.generation import generate
from abi_py.generation.decoder import Decoder
from abi_py.model import LoraModel, TrainableModel
from abi_py.model.frozen import FrozenModel

NEW, VOCABULARY = 48, 300
SHAPE = {
    **{"hidden_dim": 256, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_dim": 512},
    **{"vocab_size": VOCABULARY, "max_seq_len": 128},
}
FAMILIES = {
    **{"llama": {"family": "llama"}, "mistral": {"family": "mistral"}, "qwen2": {"family": "qwen2"}},
    "llama_untied": {"family": "llama", "attention_bias": True, "tie_embeddings": False, "head_dim": 32},
    "mixtral": {"family": "mixtral", "num_experts": 4},
    "qwen3_moe": {
        **{"family": "qwen3_moe", "head_dim": 64, "num_experts": 6, "experts_per_token": 2, "expert_dim": 256},
        "norm_topk_prob": True,
    },
    "qwen3": {"family": "qwen3", "head_dim": 128},
    "gpt2": {"family": "gpt2", "num_kv_heads": 4},
    "gemma3": {"family": "gemma3", "sliding_window": 16},
}
GELU = ("gpt2", "gemma3")  # which llama.cpp looks up in a table of halves


class Opened:
    """A file of a model in llama.cpp, with adapters on it."""

    def __init__(self, llama_cpp, path):
        self.library, loading = llama_cpp, llama_cpp.llama_model_default_params()
        loading.use_extra_bufts = False  # its AMX kernels take tiles that nobody has asked the system for
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), loading)
        assert self.model, "llama.cpp does not load it"
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = SHAPE["max_seq_len"]
        options.n_threads = options.n_threads_batch = 2
        options.type_k = options.type_v = 0  # keys and values in float32
        options.flash_attn_type = 0  # off: it rounds queries and scores to halves
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        assert self.context

    def put_on(self, *paths):
        """Put adapters on the model, in place of those before; return how many it takes."""
        found = [self.library.llama_adapter_lora_init(self.model, str(path).encode()) for path in paths]
        taken = [each for each in found if each]
        kind = self.library.llama_adapter_lora_p_ctypes
        scales = (ctypes.c_float * len(taken))(*[1.0] * len(taken))
        assert self.library.llama_set_adapters_lora(self.context, (kind * len(taken))(*taken), len(taken), scales) == 0
        return len(taken)

    def logits(self, ids, past=0):
        """Return those of each id, after `past` ids that were given before."""
        if not past:
            self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)
        batch = self.library.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(token), past + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, 1
        assert self.library.llama_decode(self.context, batch) == 0
        out = np.ctypeslib.as_array(self.library.llama_get_logits(self.context), (len(ids), VOCABULARY)).copy()
        self.library.llama_batch_free(batch)
        return out

    def greedy(self, prompt):
        """Return the ids that it writes."""
        row, found = self.logits(prompt)[-1], []
        for past in range(len(prompt), len(prompt) + NEW):
            found.append(int(row.argmax()))
            row = self.logits(found[-1:], past)[-1]
        return found

    def close(self):
        """Free what it holds."""
        self.library.llama_free(self.context)
        self.library.llama_model_free(self.model)


@pytest.fixture
def opened(llama_cpp):
    """Return a function that opens a file."""
    made = []
    yield lambda path: made.append(Opened(llama_cpp, path)) or made[-1]
    for each in made:
        each.close()


def log_probabilities(logits):
    below = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return below - np.log(np.exp(below).sum(-1, keepdims=True))


def made(name):
    model = TrainableModel(TrainableModelConfig(**(SHAPE | FAMILIES[name])))
    rng = np.random.default_rng(5)
    for w in model.weights.values():
        if w.ndim == 1:
            w += 0.2 * rng.standard_normal(w.shape).astype(np.float32)
        else:
            w *= 2
    return model


def adapted(model, **changes):
    """Return a model with adapters that change what it says."""
    lora = LoraModel(model, LoraConfig(**({"rank": 4, "alpha": 6.0} | changes)))
    lora.parameters.weights_flat[:] = np.random.default_rng(7).normal(0, 0.05, lora.num_params())
    return lora


@pytest.mark.parametrize("name", FAMILIES)
def test_log_probabilities_in_float32(name, opened, tmp_path):
    model = made(name)
    lora, ids = adapted(model, use_rslora=name == "qwen2"), np.random.default_rng(1).integers(0, VOCABULARY, 48)
    model.export_to_gguf(tmp_path / "m.gguf")
    lora.save_gguf(tmp_path / "a.gguf")
    theirs = opened(tmp_path / "m.gguf")
    plain = log_probabilities(theirs.logits(ids))
    assert theirs.put_on(tmp_path / "a.gguf") == 1
    found = log_probabilities(theirs.logits(ids))
    assert np.abs(found - plain).max() > 0.1
    off = np.abs(found - log_probabilities(lora.forward(ids[None])[0])).max()
    print(name, f"{off:.1e}")
    assert off < (3e-3 if name in GELU else 1e-4)


def decoded(model, ids, integer):
    """Return the log-probabilities after each id, as generation computes them."""
    decoder = Decoder(model, integer=integer)
    rows = [decoder.prefill(0, ids[:1]).copy()]
    rows += [decoder.step(np.array([0]), np.array([each]))[0].copy() for each in ids[1:]]
    return log_probabilities(np.array(rows))


EXPERTS = ("mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj")


@pytest.mark.parametrize("chosen", [EXPERTS, EXPERTS[:1], EXPERTS[1:2], EXPERTS[2:]])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_and_routers(name, chosen, opened, tmp_path):
    """The same text and log-probabilities; routers move the choice of experts, stacks what these compute."""
    model, prompt = made(name), [5, 17, 233, 8]
    lora = adapted(model, target_parameters=chosen, rank_pattern={"down_proj": 6} if EXPERTS[2] in chosen else None)
    for view in lora.weights.values():
        view *= 2
    model.export_to_gguf(tmp_path / "m.gguf")
    lora.save_gguf(tmp_path / "a.gguf")
    theirs = opened(tmp_path / "m.gguf")
    plain = theirs.greedy(prompt)
    assert theirs.put_on(tmp_path / "a.gguf") == 1
    found = theirs.greedy(prompt)
    assert generate(lora, prompt, NEW, temperature=0).tolist() == found
    assert found != plain
    ids = np.array(prompt + found)
    wanted = log_probabilities(theirs.logits(ids))
    assert np.abs(wanted - log_probabilities(lora.forward(ids[None])[0])).max() < 1e-4
    again = LoraModel.load(model, tmp_path / "a.gguf")
    assert np.abs(wanted - log_probabilities(again.forward(ids[None])[0])).max() < 1e-4


def test_ranks_and_factors_of_some_modules(opened, tmp_path):
    """A file has one alpha: B takes what is left."""
    model = made("llama")
    patterns = {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {"v_proj": 11.0}}
    lora, ids = adapted(model, **patterns), np.arange(40)
    model.export_to_gguf(tmp_path / "m.gguf")
    lora.save_gguf(tmp_path / "a.gguf")
    theirs = opened(tmp_path / "m.gguf")
    assert theirs.put_on(tmp_path / "a.gguf") == 1
    wanted = log_probabilities(lora.forward(ids[None])[0])
    assert np.abs(log_probabilities(theirs.logits(ids)) - wanted).max() < 1e-4
    again = LoraModel.load(model, tmp_path / "a.gguf")
    assert np.abs(log_probabilities(again.forward(ids[None])[0]) - wanted).max() < 1e-4


@pytest.mark.parametrize("kind", ["F32", "F16"])
@pytest.mark.parametrize("type", ["Q4_K_M", "Q8_0"])
def test_on_a_quantised_model(type, kind, opened, tmp_path):
    """Of the same weights decoded, llama.cpp computes the same; of blocks, it rounds activations to 8 bits first.

    That alone moves log-probabilities of this model by 0.06 at most, with the adapters and without.
    """
    made("llama").export_to_gguf(tmp_path / "m.gguf", type)
    model = FrozenModel.from_gguf(tmp_path / "m.gguf")
    model.export_to_gguf(tmp_path / "decoded.gguf")
    adapted(model).save_gguf(tmp_path / "a.gguf", kind)
    lora, prompt = LoraModel.load(model, tmp_path / "a.gguf"), [5, 17, 233, 8]
    exact, theirs = opened(tmp_path / "decoded.gguf"), opened(tmp_path / "m.gguf")
    for each in (exact, theirs):
        assert each.put_on(tmp_path / "a.gguf") == 1
    found = theirs.greedy(prompt)
    ids = np.array(prompt + found)
    wanted = log_probabilities(theirs.logits(ids))
    off = np.abs(log_probabilities(exact.logits(ids)) - decoded(lora, ids, False)).max()
    assert off < {"F32": 1e-4, "F16": 1e-2}[kind]  # of F16 it rounds the input, too
    for integer in (True, False):
        assert generate(lora, prompt, NEW, temperature=0, integer_products=integer).tolist() == found
        off = np.abs(wanted - decoded(lora, ids, integer))
        print(type, kind, integer, f"{np.median(off):.1e} {off.max():.1e}")
        assert np.median(off) < 1.5e-2
        assert off.max() < 0.1
    theirs.put_on()
    off = np.abs(log_probabilities(theirs.logits(ids)) - decoded(model, ids, True))
    assert np.median(off) > 2e-3  # it is not the adapters that are rounded


def test_merged_and_quantised_again(opened, tmp_path):
    """The file of the base with the adapters in it, as `merge --to gguf` writes it."""
    made("llama").export_to_gguf(tmp_path / "m.gguf", "Q4_K_M")
    lora = adapted(FrozenModel.from_gguf(tmp_path / "m.gguf"))
    lora.export_to_gguf(tmp_path / "merged.gguf", "Q4_K_M")
    model, prompt = FrozenModel.from_gguf(tmp_path / "merged.gguf"), [5, 17, 233, 8]
    theirs = opened(tmp_path / "merged.gguf")
    found = theirs.greedy(prompt)
    ours = generate(model, prompt, NEW, temperature=0).tolist()
    rows = decoded(model, np.array(prompt + found), True)
    assert np.median(np.abs(log_probabilities(theirs.logits(prompt + found)) - rows)) < 1.5e-2
    parted = next((i for i, pair in enumerate(zip(ours, found, strict=True)) if pair[0] != pair[1]), None)
    if parted is not None:  # both were about as likely
        row = rows[len(prompt) - 1 + parted]
        assert abs(row[ours[parted]] - row[found[parted]]) < 0.1


@pytest.mark.parametrize("wrong", ["architecture", "width", "layers"])
def test_what_it_refuses_is_refused_here(wrong, opened, tmp_path):
    model, other = made("llama"), made("qwen2")
    if wrong != "architecture":
        changes = {"width": {"intermediate_dim": 768}, "layers": {"num_layers": 3}}[wrong]
        other = TrainableModel(TrainableModelConfig(**(SHAPE | changes)))
    model.export_to_gguf(tmp_path / "m.gguf")
    adapted(other).save_gguf(tmp_path / "a.gguf")
    assert opened(tmp_path / "m.gguf").put_on(tmp_path / "a.gguf") == 0
    with pytest.raises(Exception, match=r"a\.gguf: .*put it on the model that it is of"):
        LoraModel.load(model, tmp_path / "a.gguf")
