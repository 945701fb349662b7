"""Every reader of the project, each with a valid folder that it reads: what the fuzzer damages.

A reader may refuse a file with an error of `abi_py.errors`, or with FileNotFoundError where a file is missing; any
other exception, a process that dies, a hang, or memory out of proportion is a defect.
"""

import contextlib
import dataclasses
import functools
import gzip
import json
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from adapter_readers import ADAPTERS, PEFT, make_adapter
from chain_readers import CHAINS
from encoded_readers import ENCODED, TOKENIZER_FILES, read_gguf_with_tokenizer, write_gguf_with
from reader import Reader, small_model, write_json
from run_readers import RUNS, mending

import abi_py as abi
from abi_py import data
from abi_py.config import SECTIONS, load_yaml, to_yaml
from abi_py.data.chat import load_template, template_for
from abi_py.data.token_types import check_token_type
from abi_py.data.tokenizer import Tokenizer
from abi_py.errors import AbiError, CheckpointError
from abi_py.families import write_config
from abi_py.formats.finite import check_read
from abi_py.formats.gguf import (
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    U8,
    U16,
    U32,
    U64,
    PlannedTensor,
    open_gguf,
    write_gguf,
)
from abi_py.formats.gguf.ggml_types import BY_NAME
from abi_py.formats.huggingface import INDEX
from abi_py.formats.safetensors import read_safetensors, write_safetensors
from abi_py.formats.zig import load_zig, save_abic, save_ablc
from abi_py.model.frozen import FrozenModel
from abi_py.runs.inspecting import inspect
from abi_py.runs.recorded import read_run
from abi_py.shape import ModelFamily
from abi_py.training.events import EvaluationEvent, StartEvent
from abi_py.training.loading import load_model
from abi_py.training.metrics import JsonlSink
from abi_py.training.trainer_state import TrainerStateSink

ROWS = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "category": "x"},
    {"instruction": "Add", "input": "1 2", "output": "3"},
    {"prompt": "p", "completion": "c"},
    {"text": "plain text"},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
            {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Rome"}}}]},
            {"role": "tool", "name": "weather", "content": "20"},
            {"role": "assistant", "content": "20 degrees"},
        ],
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": {}}}],
    },
]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}\n{% else %}<|answer|>{{ m.content }}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|answer|>{% endif %}"
)


# -- models --------------------------------------------------------------------------------------


def _hugging_face(folder: Path) -> None:
    model = small_model()
    write_json(folder / "config.json", write_config(model.config))
    tensors = {entry.hf_name: model.weights[entry.name] for entry in model.parameters.table}
    write_safetensors(folder / "model.safetensors", {k: np.ascontiguousarray(v) for k, v in tensors.items()})
    write_json(folder / "generation_config.json", {"do_sample": True, "temperature": 0.7, "eos_token_id": [3, 4]})


def _sharded(folder: Path) -> None:
    _hugging_face(folder)
    tensors = {name: np.array(tensor) for name, tensor in read_safetensors(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    places = {name: f"model-0000{1 + (i > 9)}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(places.values()):
        write_safetensors(folder / shard, {name: tensors[name] for name in names if places[name] == shard})
    write_json(folder / INDEX, {"metadata": {"total_size": 1}, "weight_map": places})


def _read_shards(folder: Path) -> None:
    inspect(folder / INDEX)
    load_model(folder)


def _family(family: ModelFamily, folder: Path) -> None:
    """Write a folder of a family in the form of its own: transposed, per expert ..., narrow, in shards."""
    shape = small_model().config.replace(family=family)
    model = abi.TrainableModel(shape)
    largest = 4 * model.num_params() // 3
    model.save_pretrained(folder, "bfloat16", largest, files={"tokenizer_config.json": "{}"})


def _read_and_save(folder: Path) -> None:
    FrozenModel.from_pretrained(folder).save_pretrained(folder / "out", "float16", files={"a.txt": ""})


def _safetensors(folder: Path) -> None:
    tensors = {"a": np.ones((2, 3), np.float32), "b": np.arange(4, dtype=np.int64), "c": np.ones((), np.float16)}
    write_safetensors(folder / "x.safetensors", tensors, {"format": "pt"})


def _sum_tensors(folder: Path) -> None:
    for tensor in read_safetensors(folder / "x.safetensors").values():
        tensor.sum()


def _zig(folder: Path) -> None:
    weights = np.ones(20, np.float32)
    save_abic(folder / "x.abic", weights, 3)
    save_ablc(folder / "x.ablc", weights, weights, weights, step=1, epoch=2, tokens_processed=3)


def _read_zig(folder: Path) -> None:
    load_zig(folder / "x.abic")
    load_zig(folder / "x.ablc")


# -- GGUF -----------------------------------------------------------------------------------------


def _gguf(folder: Path) -> None:
    """Write a file with every type of value, and the same in three parts."""
    chance = np.random.default_rng(0)
    shapes = {"a": ((2, 3, 256), "Q4_K"), "b": ((3, 32), "F32"), "c": ((64,), "F16"), "d": ((2, 32), "Q8_0")}
    tensors = []
    for name, (shape, kind) in shapes.items():
        planned = PlannedTensor(name=name, shape=shape, kind=BY_NAME[kind], rows=lambda first, last: 0)
        raw = chance.integers(0, 60, (planned.num_rows, planned.row_bytes), np.uint8).view(planned.kind.dtype)
        tensors.append(dataclasses.replace(planned, rows=lambda first, last, raw=raw: raw[first:last]))
    metadata = {
        **{"general.architecture": "llama", "a.u8": U8(1), "a.i8": I8(-1), "a.u16": U16(2), "a.i16": I16(-2)},
        **{"a.u32": U32(3), "a.i32": I32(-3), "a.f32": F32(0.5), "a.yes": True, "a.u64": U64(4), "a.i64": I64(-4)},
        **{"a.f64": F64(0.25), "general.alignment": U32(64), "a.words": ["a", "", "\u4f60\u597d"]},
        **{"a.numbers": np.arange(5, dtype=np.int32), "a.bools": np.array([True, False])},
    }
    write_gguf(folder / "x.gguf", metadata, tensors)
    write_gguf(folder / "y.gguf", metadata, tensors, largest=800)


def _read_gguf(folder: Path) -> None:
    for name in ("x.gguf", "y-00002-of-00003.gguf"):
        file = open_gguf(folder / name)
        for key in file.metadata:
            with contextlib.suppress(CheckpointError):
                file.metadata[key]
            with contextlib.suppress(CheckpointError):
                file.require(key, int | float | bool | str | list[int] | list[float] | list[bool] | list[str])
        for tensor in file.tensors.values():
            tensor.raw.sum()
        with contextlib.suppress(CheckpointError):
            check_read(file.path, file.tensors)


# -- runs ------------------------------------------------------------------------------------------


def _trainer(folder: Path) -> abi.LlamaTrainer:
    config = abi.LlmTrainingConfig(
        batch_size=2, max_seq_len=8, grad_accum_steps=2, warmup_steps=0, max_steps=2, checkpoint_path=str(folder)
    )
    return abi.LlamaTrainer(small_model(), config)


TOKENS = [i % 32 for i in range(200)]


def _checkpoint(folder: Path) -> None:
    _trainer(folder).fit(abi.TokenizedDataset.from_slice(TOKENS))


CHECKPOINT = "llm_step_2"


def _resume(folder: Path) -> None:
    trainer = _trainer(folder)
    trainer.load_checkpoint(folder)


def _yaml(folder: Path) -> None:
    config = _trainer(folder).config
    early = abi.EarlyStoppingConfig()
    (folder / "config.yaml").write_text(to_yaml(model=small_model().config, training=config, early_stopping=early))


def _read_yaml(folder: Path) -> None:
    for name, values in load_yaml(folder / "config.yaml").items():
        SECTIONS[name].from_dict(values)


def _run_files(folder: Path) -> None:
    rows = [{"step": 1, "loss": 2.0, "epoch": 0.5}, {"step": 9, "eval_loss": 1.0, "epoch": 3.0}]
    best = {"best_metric": 1.5, "best_global_step": 1, "best_model_checkpoint": "llm_step_1"}
    write_json(folder / "trainer_state.json", {"log_history": rows, **best})
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"time": 0.1, **row}) + "\n" for row in rows))


EVALUATION = EvaluationEvent(
    step=3, time=2.0, epoch=1, val_loss=1.0, val_perplexity=2.7, val_accuracy=0.5, val_tokens=9, improved=True
)


def _read_run_files(folder: Path) -> None:
    sizes = {name: 1 for name in ("steps_per_epoch", "rows", "valid_rows", "input_tokens", "batch_size")}
    steps = {name: 1 for name in ("logging_steps", "eval_steps", "save_steps")}
    start = StartEvent(
        step=2, time=1.0, epoch=1, epochs=1, total_steps=4, num_params=1, tokens_per_step=1, flops_per_token=1.0
    )
    for sink in (
        TrainerStateSink(folder / "trainer_state.json", **sizes, **steps),
        JsonlSink(folder / "metrics.jsonl"),
    ):
        sink.handle(start)
        sink.handle(EVALUATION)
        sink.close()


def _recorded(folder: Path) -> None:
    _yaml(folder)
    write_json(folder / "report.json", {"total_steps": 2, "interrupted": False})
    for event in ({"type": "start", "step": 0, "num_params": 9, "tokens_per_step": 16}, {"type": "step", "step": 1},
                  {"type": "evaluation", "step": 2, "val_loss": 1.5, "val_tokens": 9}):  # fmt: skip
        with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({**event, "time": 1.0, "loss": 2.0, "tokens": 32}) + "\n")


def _read_recorded(folder: Path) -> None:
    for brief in (True, False):
        run = read_run(folder, brief)
        _ = run.step, run.tokens, run.seconds, run.best, run.last, run.tokens_per_second, run.num_params


# -- text and conversations ------------------------------------------------------------------------

TEXTS = ["the quick brown fox jumps over the lazy dog. "] * 20


def _tokenizer(folder: Path) -> None:
    special = ["<|user|>", "<|answer|>", "<|end|>"]
    backend = data.train_tokenizer(TEXTS, vocab_size=270, special_tokens=special).backend
    Tokenizer(backend, {"eos_token": "<|end|>", "chat_template": TEMPLATE}).save(folder)
    write_json(folder / "special_tokens_map.json", {"eos_token": {"content": "<|end|>"}, "pad_token": "<|end|>"})


def _bpe_in_gguf(folder: Path) -> None:
    write_gguf_with(TOKENIZER, folder)


def _sentencepiece_in_gguf(folder: Path) -> None:
    _sentencepiece(folder)
    write_gguf_with(Tokenizer.load(folder), folder)


def _sentencepiece(folder: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, processors

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a", "ab"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [("\u2581", "a"), ("a", "b")]
    backend = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"}).save(folder)


def _read_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    tokenizer.decode(tokenizer.encode("ab the fox \u4f60"))
    if tokenizer.chat_template is not None:
        data.ChatDataset.encode([CHAT], template_for(tokenizer), tokenizer, max_seq_len=64)


CHATML = load_template("chatml")
CHAT = data.read_conversation(ROWS[0])
with tempfile.TemporaryDirectory() as _folder:
    _tokenizer(Path(_folder))
    TOKENIZER = Tokenizer.load(_folder)


def _template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    named = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "{{ tools }}"}]
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|end|>", "chat_template": named})


def _read_template(folder: Path) -> None:
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        with contextlib.suppress(AbiError):
            data.ChatDataset.encode([CHAT], load_template(folder / name), TOKENIZER, max_seq_len=64)


def _rows(folder: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "x.jsonl").write_text(lines)
    (folder / "x.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    write_json(folder / "x.json", ROWS)


def _read_rows(folder: Path) -> None:
    for skip in (True, False):
        for name in READER_ROWS.files:
            chosen = data.select_conversations([folder / name], skip_bad_rows=skip)
            for conversation in chosen.conversations:
                CHATML.render(conversation)


def _documents(folder: Path) -> None:
    (folder / "x.txt").write_text("one text\n" * 5)
    (folder / "x.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (folder / "x.json").write_text('[{"text": "a"}, {"text": "b"}]')


def _read_documents(folder: Path) -> None:
    for skip in (True, False):
        for name in READER_DOCUMENTS.files:
            for document in data.Documents([folder / name], skip_bad_rows=skip):
                for _ in document.blocks:
                    pass


def _tokens(folder: Path) -> None:
    (folder / "x.txt").write_text("one text\n" * 5)
    data.tokenize_to_file([folder / "x.txt"], folder / "x.bin")


def _read_tokens(folder: Path) -> None:
    info = data.read_sidecar(folder / "x.bin")
    dataset = data.TokenizedDataset.load(folder / "x.bin")
    dataset.check_vocab()
    check_token_type(folder / "x.bin", None)
    for _ in dataset.batches(2, 8):
        pass
    if info is not None:
        info.load_tokenizer(folder / "x.bin")


def _packed(folder: Path) -> None:
    """Write rows and texts as they are in archives and tables."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "x.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "x.txt.gz").write_bytes(gzip.compress(b"one text\n" * 5))


def _read_packed(folder: Path) -> None:
    for conversation in data.select_conversations([folder / "x.jsonl.gz"], skip_bad_rows=True).conversations:
        CHATML.render(conversation)
    for document in data.Documents([folder / "x.txt.gz"]):
        for _ in document.blocks:
            pass


def _parquet(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"instruction": ["Add", "Sum"], "input": ["1 2", None], "output": ["3", "4"]})
    pyarrow.parquet.write_table(table, folder / "x.parquet")
    texts = pyarrow.table({"text": ["a text", "another"], "n": [1, 2]})
    pyarrow.parquet.write_table(texts, folder / "y.parquet", compression="none")


def _read_parquet(folder: Path) -> None:
    for conversation in data.select_conversations([folder / "x.parquet"], skip_bad_rows=True).conversations:
        CHATML.render(conversation)
    for document in data.Documents([folder / "y.parquet"], skip_bad_rows=True):
        for _ in document.blocks:
            pass


# -- whatever it is ----------------------------------------------------------------------------------

INSPECTED = {
    "model": (_hugging_face, ("config.json", "model.safetensors", "generation_config.json")),
    "adapter": (make_adapter, PEFT),
    "zig": (_zig, ("x.abic", "x.ablc")),
    "gguf": (_gguf, ("x.gguf",)),
    "tokenizer": (_tokenizer, ("tokenizer.json",)),
    "tokens": (_tokens, ("x.bin", "x.bin.json")),
    "rows": (_rows, ("x.jsonl", "x.json")),
}


def _all_kinds(folder: Path) -> None:
    for name, (make, _) in INSPECTED.items():
        (folder / name).mkdir()
        make(folder / name)


def _inspect(folder: Path) -> None:
    for name, (_, files) in INSPECTED.items():
        inspect(folder / name)
        for file in files:
            if (folder / name / file).exists():
                inspect(folder / name / file)


# -- the table -------------------------------------------------------------------------------------

STATE = ("state.json", "config.yaml", "optimizer.safetensors", "model.safetensors")
INSIDE = tuple(f"{CHECKPOINT}/{name}" for name in STATE)
READER_ROWS = Reader("conversations", _rows, ("x.jsonl", "x.json"), _read_rows, share=4)
READER_DOCUMENTS = Reader("documents", _documents, ("x.txt", "x.jsonl", "x.json"), _read_documents, share=24)
READERS = (
    Reader("safetensors", _safetensors, ("x.safetensors",), _sum_tensors, share=60),
    Reader("folder", _hugging_face, ("config.json", "model.safetensors"), load_model, share=8),
    Reader("shards", _sharded, (INDEX, "model-00001-of-00002.safetensors"), _read_shards, share=6),
    *(
        Reader(
            f"folder of {family.value}",
            functools.partial(_family, family),
            ("config.json", INDEX, "model-00001-of-00002.safetensors"),
            _read_and_save,
            share=3,
        )
        for family in ModelFamily
    ),
    Reader("generation", _hugging_face, ("generation_config.json",), abi.GenerationConfig.load, share=40),
    Reader("gguf", _gguf, ("x.gguf", *(f"y-0000{i}-of-00003.gguf" for i in (1, 2, 3))), _read_gguf, share=40),
    Reader("model in gguf", _bpe_in_gguf, ("x.gguf",), read_gguf_with_tokenizer, share=20),
    Reader("sentencepiece in gguf", _sentencepiece_in_gguf, ("x.gguf",), read_gguf_with_tokenizer, share=4),
    *ENCODED,
    Reader("zig", _zig, ("x.abic", "x.ablc"), _read_zig, share=40),
    *ADAPTERS,
    Reader("checkpoint", _checkpoint, (*INSIDE, "latest"), _resume),
    Reader("mended checkpoint", _checkpoint, INSIDE, _resume, mending(CHECKPOINT)),
    Reader("config.yaml", _yaml, ("config.yaml",), _read_yaml),
    Reader("run files", _run_files, ("trainer_state.json", "metrics.jsonl"), _read_run_files, share=30),
    Reader("tokenizer", _tokenizer, (*TOKENIZER_FILES, "special_tokens_map.json"), _read_tokenizer),
    Reader("sentencepiece", _sentencepiece, TOKENIZER_FILES, _read_tokenizer, share=4),
    Reader("template", _template, ("chat_template.jinja", "tokenizer_config.json"), _read_template, share=4),
    READER_ROWS,
    READER_DOCUMENTS,
    Reader("packed", _packed, ("x.jsonl.gz", "x.txt.gz"), _read_packed, share=4),
    *(
        [Reader("parquet", _parquet, ("x.parquet", "y.parquet"), _read_parquet, share=4)]
        if find_spec("pyarrow")
        else []
    ),
    *RUNS,
    *CHAINS,
    Reader("recorded run", _recorded, ("config.yaml", "metrics.jsonl", "report.json"), _read_recorded, share=2),
    Reader("inspect", _all_kinds, tuple(f"{k}/{f}" for k, (_, fs) in INSPECTED.items() for f in fs), _inspect),
    Reader("tokens", _tokens, ("x.bin", "x.bin.json"), _read_tokens, share=30),
)
