"""What adapters are put on, and what is trained whole beside them, against PEFT: read both ways, trained, merged."""

import json

import numpy as np
import pytest
from world import make_folder

from abi_py.config import LlmTrainingConfig, LoraConfig
from abi_py.formats.peft import read_adapter
from abi_py.formats.safetensors import write_safetensors
from abi_py.model import LoraModel
from abi_py.training.loading import load_model
from abi_py.training.trainer import LlamaTrainer

IDS = np.random.default_rng(0).integers(1, 60, (3, 12))
STEPS, RATE = 10, 5e-3
LLAMA = ("llama", {})
UNTIED = ("llama", {"tie_embeddings": False})
TIED = ("qwen2", {"tie_embeddings": True})
GPT2 = ("gpt2", {})
OTHERS = {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 5}, "modules_to_save": ["norm"]}
MIXTRAL = ("mixtral", {"router_aux_loss_coef": 0.0})
QWEN3_MOE = ("qwen3_moe", {"router_aux_loss_coef": 0.0})
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES = {
    "all-linear": (LLAMA, {"target_modules": "all-linear"}),
    "regex": (LLAMA, {"target_modules": r".*layers\.1\.(self_attn\.(q|v)|mlp\.up)_proj"}),
    "regex, left out": (LLAMA, {"target_modules": r".*_proj", "exclude_modules": r".*\.mlp\..*"}),
    "left out": (LLAMA, {"target_modules": "all-linear", "exclude_modules": ["k_proj", "layers.0.mlp.up_proj"]}),
    "blocks": (LLAMA, {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}),
    "blocks, named": (
        LLAMA,
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": ["blocks", "layers"]},
    ),
    "ranks": (
        LLAMA,
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 5, r"layers\.1\.mlp\..*": 2, "mlp.up_proj": 7}},
    ),
    "ranks and alphas, rslora": (
        LLAMA,
        {"target_modules": ["q_proj", "k_proj", "v_proj"], "rank_pattern": {"0.self_attn.q_proj": 6}}
        | {"alpha_pattern": {"q_proj": 3, "v_proj": 20.5}, "use_rslora": True},
    ),
    "head": (UNTIED, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "embedding": (UNTIED, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "both ends": (UNTIED, {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "norms": (LLAMA, {"target_modules": ["up_proj"], "modules_to_save": ["norm"]}),
    "a branch": (LLAMA, {"target_modules": "all-linear", "modules_to_save": ["layers.1.mlp"]}),
    "one of three": (LLAMA, {"target_modules": "all-linear", "modules_to_save": ["k_proj"]}),
    "tied: head": (TIED, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied: embedding": (TIED, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "tied: both": (TIED, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied: one": (
        TIED,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "tied: one, by the head": (
        TIED,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    ),
    "adapted embedding": (UNTIED, {"target_modules": ["q_proj", "embed_tokens"], "rank_pattern": {"embed_tokens": 7}}),
    "adapted head": (UNTIED, {"target_modules": ["lm_head"]}),
    "adapted ends": (UNTIED, {"target_modules": ["embed_tokens", "lm_head"], "alpha_pattern": {"lm_head": 3}}),
    "tied: adapted embedding": (TIED, {"target_modules": ["q_proj", "embed_tokens"], "use_rslora": True}),
    "tied: adapted head": (TIED, {"target_modules": ["q_proj", "lm_head"]}),
    "tied: one adapted": (TIED, {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]}),
    "gpt2: adapted ends": (GPT2, {"target_modules": ["wte", "wpe", "c_attn", "lm_head"]}),
    "gemma3: adapted ends": (("gemma3", {}), {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "biases": (("qwen2", {}), {"target_modules": ["q_proj", "down_proj"], "bias": "all"}),
    "their biases": (("qwen2", {}), {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only"}),
    "gpt2": (GPT2, {"target_modules": ["c_attn", "mlp.c_proj"], "bias": "all"}),
    "gpt2: ends": (GPT2, {"target_modules": ["c_attn"], "modules_to_save": ["wpe", "ln_f", "wte"]}),
    "gpt2: branch": (GPT2, {"target_modules": ["c_attn"], "modules_to_save": ["h.0.mlp"], "bias": "lora_only"}),
    **{family: ((family, {}), OTHERS) for family in ("mistral", "qwen3", "gemma3")},
    "mixtral: a branch": (
        ("mixtral", {"router_aux_loss_coef": 0.0}),
        {"target_modules": ["q_proj"], "modules_to_save": ["layers.1.mlp"]},
    ),
    **{family: ((family, {"router_aux_loss_coef": 0.0}), OTHERS) for family in ("mixtral", "qwen3_moe")},
    **{
        f"{family}: experts": (
            (family, {"router_aux_loss_coef": 0.0}),
            {"target_modules": ["q_proj", "o_proj"], "target_parameters": EXPERTS, "rank_pattern": {"down_proj": 3}},
        )
        for family in ("mixtral", "qwen3_moe")
    },
    "mixtral: gate and up alone": (MIXTRAL, {"target_parameters": ["experts.gate_up_proj"], "use_rslora": True}),
    "mixtral: down alone": (MIXTRAL, {"target_modules": [], "target_parameters": ["1.mlp.experts.down_proj"]}),
    "mixtral: as before version 5": (MIXTRAL, {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
    "mixtral: all-linear": (MIXTRAL, {"target_modules": "all-linear"}),
    "mixtral: routers": (MIXTRAL, {"target_modules": ["q_proj", "gate"]}),
    "mixtral: routers alone": (
        MIXTRAL,
        {"target_parameters": ["mlp.gate.weight"], "rank_pattern": {"0.mlp.gate.weight": 3}, "use_rslora": True},
    ),
    "qwen3_moe: all-linear": (QWEN3_MOE, {"target_modules": "all-linear", "rank_pattern": {"down_proj": 3}}),
    "qwen3_moe: routers and down": (
        QWEN3_MOE,
        {"target_modules": ["v_proj"], "target_parameters": ["1.mlp.gate.weight", "experts.down_proj"]},
    ),
}


@pytest.fixture
def world(request, transformers, peft, torch, tmp_path):
    """Return the folder of a base, of PEFT's adapters on it with random values, and the model with these."""
    (family, changes), settings = CASES[request.param]
    base = make_folder(tmp_path / "base", family=family, num_layers=2, **changes)
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **settings))
    with torch.no_grad():
        for values in adapted.parameters():
            if values.requires_grad:
                values.add_(torch.randn_like(values) * 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter", adapted


def logits_of(model, torch):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(IDS)).logits.numpy()


@pytest.mark.parametrize("world", CASES, indirect=True)
def test_read_trained_and_written(world, transformers, peft, torch, tmp_path):
    """Its adapter is read with its logits; ten steps have its losses; merged, and read by it, ours has its logits."""
    base, adapter, theirs = world
    plain = load_model(base).model
    ours = LoraModel.load(plain, adapter)
    names = [name for name, values in theirs.named_parameters() if values.requires_grad]
    trained = {name: values.numel() for name, values in theirs.named_parameters() if values.requires_grad}
    assert ours.num_params() == sum(trained.values()), names
    wanted = logits_of(theirs, torch)
    assert np.abs(ours.forward(IDS) - wanted).max() < 1e-4
    assert np.abs(plain.forward(IDS) - wanted).max() > 1e-2

    optimizer = torch.optim.AdamW([v for v in theirs.parameters() if v.requires_grad], lr=RATE, weight_decay=0.0)
    labels = torch.tensor(IDS)
    config = LlmTrainingConfig(
        batch_size=3, max_seq_len=12, grad_accum_steps=1, learning_rate=RATE, lr_schedule="constant", warmup_steps=0,
        weight_decay=0.0, max_grad_norm=0.0, beta2=0.999,
    )  # fmt: skip
    trainer = LlamaTrainer(ours, config)
    theirs.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        out = theirs(input_ids=labels).logits
        loss = torch.nn.functional.cross_entropy(out[:, :-1].reshape(-1, out.shape[-1]), labels[:, 1:].reshape(-1))
        loss.backward()
        optimizer.step()
        shifted = np.concatenate([IDS[:, 1:], np.full((3, 1), -100)], axis=1)
        metrics = trainer.train_step_with_metrics(IDS, shifted)
        assert abs(metrics.loss - float(loss.detach())) < 1e-4

    wanted = logits_of(theirs, torch)
    found = ours.forward(IDS)
    assert np.abs(found - wanted).max() < 2e-3 * np.abs(wanted).max()
    ours.save(tmp_path / "saved", str(base))
    said = read_adapter(tmp_path / "saved").config
    assert said.replace(seed=0) == ours.lora.replace(seed=0)
    fresh = transformers.AutoModelForCausalLM.from_pretrained(base)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "saved")
    assert np.abs(logits_of(again, torch) - found).max() < 1e-4
    assert np.abs(LoraModel.load(plain, tmp_path / "saved").forward(IDS) - found).max() == 0

    ours.save_pretrained(tmp_path / "merged")
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert np.abs(logits_of(whole, torch) - found).max() < 1e-4
    if not plain.config.tie_embeddings or ours.stored_config().tie_embeddings:  # PEFT's merge ties them again
        merged = again.merge_and_unload().state_dict()
        tensors = whole.state_dict()
        assert set(merged) == set(tensors)
        assert max(float((merged[name] - tensors[name]).abs().max()) for name in tensors) < 1e-5
    content = json.loads((tmp_path / "saved/adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == str(base)


@pytest.mark.parametrize("settings", [{}, {"rank_pattern": {"down_proj": 3, "gate.weight": 2}}])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_all_linear_means_experts_and_routers(family, settings, transformers, peft, tmp_path):
    """The same tensors of the same shapes, each with the same factor."""
    base = make_folder(tmp_path / "base", family=family, num_layers=2)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules="all-linear", **settings)
    theirs = peft.get_peft_model(model, config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = LoraModel(load_model(base).model, LoraConfig(rank=4, alpha=6, **settings))
    ours.save(tmp_path / "ours", str(base))
    one, other = (read_adapter(tmp_path / each) for each in ("ours", "theirs"))
    assert {name: w.shape for name, w in one.tensors.items()} == {name: w.shape for name, w in other.tensors.items()}
    factors = {
        f"{name.removeprefix('base_model.model.')}.{module.parameter_name}": module.scaling["default"]
        for name, module in theirs.named_modules()
        if type(module).__name__ == "ParamWrapper"
    }
    for target in ours.targets():
        inside = target.module.replace(".experts.", ".experts.base_layer.") if target.inside else target.module
        assert target.scale == factors.get(inside, 1.5), target.module
    assert len(factors) == 6


PARTS = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}


@pytest.mark.parametrize("targets", ["names", "regex", "all-linear", "routers"])
@pytest.mark.parametrize("family", PARTS)
def test_adapters_from_before_version_5(family, targets, transformers, peft, torch, tmp_path):
    """A folder that names each expert's matrix, and the router, as modules; its dropout acts in training only."""
    base = make_folder(tmp_path / "base", family=family, num_layers=2, router_aux_loss_coef=0.0)
    block, (gate, up, down) = PARTS[family]
    shape, rng, tensors = load_model(base).model.config, np.random.default_rng(2), {}

    def put(module, outer, inner):
        for half, sizes in (("A", (3, inner)), ("B", (outer, 3))):
            tensors[f"base_model.model.model.layers.{module}.lora_{half}.weight"] = rng.normal(0, 0.3, sizes)

    for layer in range(2):
        put(f"{layer}.self_attn.q_proj", shape.num_heads * shape.resolved_head_dim, shape.hidden_dim)
        put(f"{layer}.{block}.gate", shape.num_experts, shape.hidden_dim)
        for e in range(shape.num_experts if targets != "routers" else 0):
            for name in (gate, up):
                put(f"{layer}.{block}.experts.{e}.{name}", shape.resolved_expert_dim, shape.hidden_dim)
            put(f"{layer}.{block}.experts.{e}.{down}", shape.hidden_dim, shape.resolved_expert_dim)
    if targets == "all-linear":
        for layer in range(2):
            for name in "kv":
                put(f"{layer}.self_attn.{name}_proj", shape.num_kv_heads * shape.resolved_head_dim, shape.hidden_dim)
            put(f"{layer}.self_attn.o_proj", shape.hidden_dim, shape.num_heads * shape.resolved_head_dim)
    chosen = {
        "names": ["q_proj", "gate", gate, up, down],
        "regex": rf".*\.(q_proj|gate|{gate}|{up}|{down})",
        "all-linear": "all-linear",
        "routers": ["q_proj", "gate"],
    }[targets]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 5, "target_modules": chosen}
    config["base_model_name_or_path"] = str(base)
    (tmp_path / "old").mkdir()
    write_safetensors(
        tmp_path / "old/adapter_model.safetensors",
        {name: values.astype(np.float32) for name, values in tensors.items()}, {"format": "pt"},
    )  # fmt: skip

    def said(**more):
        (tmp_path / "old/adapter_config.json").write_text(json.dumps(config | more))

    said()
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    wanted = logits_of(peft.PeftModel.from_pretrained(model, tmp_path / "old"), torch)
    plain = load_model(base).model
    said(lora_dropout=0.05)  # which version 5 does not take any more
    ours = LoraModel.load(plain, tmp_path / "old")
    assert ours.lora.dropout == 0
    assert np.abs(ours.forward(IDS) - wanted).max() < 1e-4
    assert np.abs(plain.forward(IDS) - wanted).max() > 1e-2
    ours.save(tmp_path / "new", str(base))
    fresh = transformers.AutoModelForCausalLM.from_pretrained(base)
    assert np.abs(logits_of(peft.PeftModel.from_pretrained(fresh, tmp_path / "new"), torch) - wanted).max() < 1e-4
