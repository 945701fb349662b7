"""A folder as the world hands it out: weights, config.json, tokenizer, chat template, generation_config.json.

No library of Hugging Face's is needed to make one.  And conversations to train it on, and matrices in NF4.
"""

import hashlib
import json

import numpy as np

from abi_py.config import TrainableModelConfig
from abi_py.data.tokenizer_training import train_tokenizer
from abi_py.families import tensor_table, write_config
from abi_py.formats.forms import to_stored
from abi_py.formats.safetensors import write_safetensors
from abi_py.kernels.storage import OF_A_MATRIX
from abi_py.kernels.storage.nf4 import VALUES

TEMPLATE = (
    "{% for turn in messages %}"
    "{{ '<|im_start|>' + turn['role'] + '\n' + turn['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SHAPE = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "intermediate_dim": 24}
SHAPE["max_seq_len"] = 96


def questions():
    """Return conversations about sums."""
    return [
        [{"role": "user", "content": f"What is {sum_}?"}, {"role": "assistant", "content": f"{sum_} is {a + b}."}]
        for a in range(6)
        for b in range(6)
        for sum_ in [f"{a} plus {b}"]
    ]


def write_talks(path):
    """Write the conversations as rows."""
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in questions()), encoding="utf-8")
    return path


def make_tokenizer():
    """Return a tokenizer of the conversations."""
    return train_tokenizer((turn["content"] for turns in questions() for turn in turns), 300, SPECIAL)


def make_folder(folder, tokenizer=True, **changes):
    """Write a model of random weights, a Qwen2 unless `changes` of its shape say otherwise, and what belongs to it."""
    folder.mkdir(parents=True)
    codec = make_tokenizer()
    sizes = {**SHAPE, "vocab_size": codec.vocab_size + 5}
    shape = TrainableModelConfig(**sizes).replace(**{"family": "qwen2", **changes})
    end = codec.id_of("<|im_end|>")
    config = {**write_config(shape), "eos_token_id": end, "bos_token_id": None, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(5)
    table = tensor_table(shape)
    made = {entry.name: rng.normal(0, 0.2, entry.shape).astype(np.float32) for entry in table}
    tensors = {
        name: np.concatenate([piece.reshape(-1) for piece in joined.numbers()]).reshape(joined.shape)
        for name, joined in to_stored(table, made).items()
    }
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 0], "pad_token_id": 0}))
    if tokenizer:
        codec.config["eos_token"] = "<|im_end|>"
        codec.save(folder)
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        (folder / "added_tokens.json").write_text(json.dumps({name: codec.id_of(name) for name in SPECIAL}))
    return folder


def write_state(checkpoint, **changes):
    """Change a checkpoint's state, and its checksum, so that it is whole."""
    path = checkpoint / "state.json"
    content = json.loads(path.read_text())
    content["state"] |= changes
    del content["checksum"]
    content["checksum"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(content))


def parts_in_nf4(name, w, double):
    """Return the tensors that bitsandbytes writes for a matrix, by name."""
    raw, kept = OF_A_MATRIX["nf4-dq" if double else "nf4"].encoded(w)
    _, codes, wide, table = kept.side
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(w.shape)}
    parts = {"": raw.reshape(-1, 1), ".quant_map": VALUES, ".absmax": codes if double else wide}
    if double:
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(wide[0])}
        parts |= {".nested_absmax": wide[1:], ".nested_quant_map": table}
    parts[".quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return {f"{name}{end}": part for end, part in parts.items()}
