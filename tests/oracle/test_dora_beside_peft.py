"""DoRA beside peft: adapters both ways, ten steps of PyTorch's AdamW from the same beginning, merged weights."""

import numpy as np
import pytest
from world import make_folder

from abi_py.config import LlmTrainingConfig
from abi_py.formats.safetensors import read_safetensors
from abi_py.model import LoraModel, TrainableModel
from abi_py.training.trainer import LlamaTrainer

FAMILIES = ["llama", "qwen2", "gpt2", "mistral", "qwen3", "gemma3"]
PATTERNS = {"rank_pattern": {"q_proj": 2, "0.mlp.down_proj": 6}, "alpha_pattern": {"k_proj": 11}}
CASES = [*((family, {}) for family in FAMILIES), *((family, {"use_rslora": True}) for family in ("llama", "gpt2"))]
CASES += [("qwen2", PATTERNS), ("llama", {"modules_to_save": ["lm_head"], "bias": "none"})]
UNTIED, TIED = {"tie_embeddings": False}, {"tie_embeddings": True}
ENDS = {  # embedding and head; peft drops nothing of an embedding
    "embedding": ("llama", UNTIED, {"target_modules": ["embed_tokens"]}),
    "head": ("llama", UNTIED, {"target_modules": ["lm_head"], "use_rslora": True}),
    "ends": ("llama", UNTIED, {"target_modules": ["v_proj", "embed_tokens", "lm_head"], "use_rslora": True}),
    "tied: embedding": ("qwen2", TIED, {"target_modules": ["embed_tokens", "o_proj"]}),
    "tied: head": ("qwen2", TIED, {"target_modules": ["lm_head"]}),
    "tied: ends": ("qwen2", TIED, {"target_modules": ["embed_tokens", "lm_head"], "alpha_pattern": {"lm_head": 3}}),
    "tables": ("gpt2", {}, {"target_modules": ["wte", "wpe", "c_attn", "lm_head"]}),
    "rows times a factor": ("gemma3", {}, {"target_modules": ["embed_tokens", "v_proj", "lm_head"]}),
}
CASES = [(family, {}, changes) for family, changes in CASES] + [*ENDS.values()]
NAMES = [str(i) for i in range(len(CASES) - len(ENDS))] + [*ENDS]
IDS = np.random.default_rng(4).integers(3, 90, (2, 2, 12))
RATE = 0.02


def settings(family, **changes):
    targets = ["c_attn", "c_fc", "mlp.c_proj"] if family == "gpt2" else ["q_proj", "k_proj", "o_proj", "down_proj"]
    return {"r": 4, "lora_alpha": 6, "target_modules": targets, "use_dora": True, **changes}


@pytest.fixture
def beside(transformers, peft, torch, tmp_path):
    """Return a function that makes the same adapters there and here, after peft's own beginning of them."""

    def made(family, shape, changes, random=False):
        base = make_folder(tmp_path / "base", family=family, **shape)
        torch.manual_seed(3)
        model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
        theirs = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings(family, **changes)))
        for name, values in theirs.named_parameters():
            if random and "lora_magnitude" in name:
                values.data *= torch.exp(0.3 * torch.randn_like(values))
            elif random and "lora_" in name:
                torch.nn.init.normal_(values, 0, 0.2)
        theirs.save_pretrained(tmp_path / "adapter")
        return theirs, LoraModel.load(TrainableModel.from_pretrained(base), tmp_path / "adapter")

    return made


def logits(theirs, torch, ids):
    with torch.no_grad():
        return theirs.eval()(input_ids=torch.tensor(ids)).logits.float().numpy()


def merged_by_theirs(model):
    """Return the matrices with their adapters in them, by module; merge_and_unload makes one of tied ends again."""
    adapted = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_magnitude_vector") and len(module.lora_magnitude_vector)
    }
    return {
        name: module.lora_variant["default"].merge_safe(module, "default", module.get_base_layer().weight.data.clone())
        for name, module in adapted.items()
    }


@pytest.mark.parametrize(("family", "shape", "changes"), CASES, ids=NAMES)
def test_both_ways_and_merged(beside, peft, torch, transformers, tmp_path, family, shape, changes):
    theirs, ours = beside(family, shape, changes, random=True)
    wanted = logits(theirs, torch, IDS[0])
    assert np.abs(ours.forward(IDS[0]) - wanted).max() < 1e-4 * max(1, np.abs(wanted).max())
    assert np.abs(ours.model.forward(IDS[0]) - wanted).max() > 0.1

    ours.save(tmp_path / "ours", str(tmp_path / "base"))
    wrote, kept = (read_safetensors(tmp_path / each / "adapter_model.safetensors") for each in ("ours", "adapter"))
    assert wrote.keys() == {name for name in kept if "base_layer" not in name}  # they save a frozen embedding too
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    again = peft.PeftModel.from_pretrained(plain, tmp_path / "ours")
    assert np.abs(logits(again, torch, IDS[0]) - wanted).max() < 1e-5 * max(1, np.abs(wanted).max())

    merged = ours.merged()
    whole = merged_by_theirs(again)
    assert whole.keys() == {target.module for target in ours.targets()}
    for target in ours.targets():
        values = whole[target.module].detach().numpy()
        values = values.T if target.tensor.hf_names[0].transposed else values
        assert np.abs(merged.weights[target.tensor.name] - values).max() < 1e-5, target.module
    check = again.merge_and_unload()
    if not merged.config.tie_embeddings and shape is not TIED and family in ("llama", "mistral"):
        assert np.abs(logits(check, torch, IDS[0]) - merged.forward(IDS[0])).max() < 1e-5 * max(1, np.abs(wanted).max())


@pytest.mark.parametrize(("family", "shape", "changes"), CASES, ids=NAMES)
def test_ten_steps(beside, torch, family, shape, changes):
    """From the lengths that each side has measured itself; the losses of both, and the weights at the end."""
    theirs, ours = beside(family, shape, changes)
    fresh = LoraModel(ours.model, ours.lora)
    for name, w in fresh.weights.items():
        if name.endswith(".m"):
            assert np.abs(w - ours.weights[name]).max() < 1e-6 * np.abs(w).max()
            ours.weights[name] = w
    trained = [values for values in theirs.parameters() if values.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
    config = LlmTrainingConfig(
        learning_rate=RATE, lr_schedule="constant", weight_decay=0.0, max_grad_norm=0.0, grad_accum_steps=1,
        max_seq_len=12, beta1=0.9, beta2=0.999, epsilon=1e-8,
    )  # fmt: skip
    trainer, losses = LlamaTrainer(ours, config), []
    theirs.train()
    for ids in IDS[[0, 1] * 5]:
        x = torch.tensor(ids)
        out = theirs(input_ids=x).logits
        loss = torch.nn.functional.cross_entropy(out.reshape(-1, out.shape[-1]), x.roll(-1, 1).reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append((loss.item(), trainer.train_step(ids, np.roll(ids, -1, 1))))
    wanted, found = np.array(losses).T
    assert np.abs(found - wanted).max() < 1e-4
    assert wanted[0] - wanted[-2] > 0.02  # of the same ids
    assert np.abs(ours.forward(IDS[0]) - logits(theirs, torch, IDS[0])).max() < 2e-3
