"""Wrong calls: what each says, and its exit code: 2 for the call, 1 for the data.  Nothing is begun or written."""

import pytest

TEXT = "some text of words and more. " * 200
FILES = {
    "text.txt": TEXT.encode(),
    "empty.txt": b"",
    "binary.txt": b"a\0b\xff",
    "x.json": b'{"a": 1}',
    "talk.jsonl": b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 20,
    "typo.yaml": b"training:\n  epochs: 2\n  learning_rat: 0.1\n",
    "value.yaml": b"data: {path: text.txt}\ntraining:\n  epochs: many\n",
    "section.yaml": b"data: {path: text.txt}\ntrainin:\n  epochs: 2\n",
    "broken.yaml": b"data: {}\ntraining: {epochs: [}\n",
    "gen.json": b'{"temperature": 1}',
}
CALLS = [
    # what is not there, or is something else
    ("run missing.txt", 2, "missing.txt) must be a file or a directory that exists; check the path"),
    ("run folder", 1, "folder holds no text: it has no files; give a text file"),
    ("run empty.txt", 1, "empty.txt is empty; a document needs at least one byte"),
    ("run binary.txt", 1, "binary.txt is not text: byte 1 is zero; convert it to UTF-8"),
    ("run x.json", 1, "x.json:1: found the keys 'a'; expected 'text'"),
    ("run talk.jsonl", 2, "tokenizer must be given for conversations"),
    ("run text.txt --tokenizer folder", 1, "folder has no tokenizer.json"),
    ("run text.txt --tokenizer x.json", 1, "x.json: lacks 'model'"),
    ("run text.txt --base folder", 2, "base (folder) holds no model"),
    ("run text.txt --base text.txt", 2, "base (text.txt)"),
    ("run text.txt --base nothing", 2, "base (nothing) does not exist"),
    ("resume folder", 1, "folder holds no checkpoint; give the directory of a run"),
    ("resume text.txt", 2, "RUN (text.txt) must be the directory of a run or of a checkpoint"),
    ("generate nothing", 2, "Path 'nothing' does not exist"),
    ("tokenizer info folder", 1, "folder has no tokenizer.json"),
    ("compare folder", 2, "RUN (folder) must be the directory of a run"),
    # empty words: an empty path would be the current directory
    ("run ''", 2, "'' is no path; give the name of a file or directory"),
    ("run --data ''", 2, "'' is no path"),
    ("run text.txt --out ''", 2, "'' is no path"),
    ("run --prompt ''", 2, "prompt () must not be empty; give at least one character"),
    # files of settings
    ("run --config typo.yaml", 2, "typo.yaml:3: section training: unknown key 'learning_rat'; did you mean learning"),
    ("run --config value.yaml", 2, "value.yaml:3: section training: epochs ('many') must be a whole number"),
    ("run --config section.yaml", 2, "section.yaml:2: unknown section 'trainin'; did you mean training?"),
    ("run --config broken.yaml", 2, "broken.yaml:2 is not YAML: "),
    ("run --config folder", 2, "'folder' is a directory"),
    ("run --config text.txt", 2, "text.txt must consist of sections"),
    ("run --config gen.json", 2, "gen.json:1: unknown section 'temperature'"),
    # numbers
    ("run --num-heads 5", 2, "hidden_dim (96) must be a multiple of num_heads (5); try 95 or 100, or num_heads 4 or 6"),
    ("run --hidden-dim -8", 2, "hidden_dim (-8) must be at least 1"),
    ("run --hidden-dim 1e30", 2, "must be between -2^63 and 2^63; write a smaller number"),
    ("run --lr nan", 2, "learning_rate (nan) must be a positive number"),
    ("run --lr 1e400", 2, "learning_rate (inf) must be a positive number"),
    ("run --weight-decay nan", 2, "weight_decay (nan) must be zero or more"),
    ("run --batch-size 1.5", 2, "batch_size ('1.5') must be a whole number"),
    ("run --valid-fraction 2", 2, "valid_fraction (2.0) must be at least 0 and below 1; the usual value is 0.05"),
    ("run --vocab-size 99999999999", 2, "vocab_size (99999999999) must be at most 2147483647"),
    # flags
    ("run --early-stoping", 2, "unknown flag --early-stoping; did you mean --early-stopping?; see"),
    ("run --epoch 3", 2, "unknown flag --epoch; did you mean --epochs?"),
    ("run --use-gp", 2, "unknown flag --use-gp; see abi-train run --help"),  # no hidden flag is suggested
    ("run --epochs", 2, "Option '--epochs' requires an argument"),
    ("run --enable-wandb", 2, "enable_wandb (True) must come with log_dir"),
    ("run text.txt --data x.json", 2, "data must be given in one way"),
    ("run text.txt --valid-data text.txt --valid-fraction 0.2", 2, "valid_fraction (0.2) acts only without valid_path"),
    # places
    ("run text.txt --out text.txt", 2, "'text.txt' is a file"),
    ("run text.txt --out /dev/null/x", 2, "out (/dev/null/x) must be in a directory, and /dev/null is no directory"),
    ("run text.txt --out text.txt/r", 2, "out (text.txt/r) must be in a directory, and text.txt is a file"),
    ("llm text.txt --out text.txt/r", 2, "out (text.txt/r) must be in a directory, and text.txt is a file"),
    ("run text.txt --checkpoint-path text.txt/c", 2, "checkpoint_path (text.txt/c) must be in a directory, and text"),
    ("run text.txt --enable-metrics-stream --log-dir text.txt/l", 2, "log_dir (text.txt/l) must be in a directory"),
    ("tokenize text.txt -o text.txt/x.bin", 2, "out (text.txt/x.bin) must be in a directory, and text.txt is a file"),
    ("tokenizer train text.txt -o text.txt/t", 2, "out (text.txt/t) must be in a directory, and text.txt is a file"),
    ("phases tiny -o text.txt/p", 2, "out (text.txt/p) must be in a directory, and text.txt is a file"),
    ("export folder -o text.txt/e", 2, "out (text.txt/e) must be in a directory, and text.txt is a file"),
    ("merge folder -o text.txt/m", 2, "out (text.txt/m) must be in a directory, and text.txt is a file"),
    ("quantize folder text.txt/q.gguf Q8_0", 2, "out (text.txt/q.gguf) must be in a directory, and text.txt is a file"),
    ("compare folder --plot text.txt/x.svg", 2, "plot (text.txt/x.svg) must be in a directory, and text.txt is a file"),
    ("tokenize text.txt -o x.txt", 2, "out (x.txt) must be named .bin"),
    ("tokenizer train text.txt -o tok --vocab-size 3", 2, "vocab_size (3) must be at least 268"),
    ("inspect text.txt --best", 2, "best has no effect: text.txt is one model, not a run; leave --best out"),
    ("run --format gguf", 2, "format ('gguf') must be one of hf, zig"),
    ("run --lora --lora-targets nonsense", 2, "target_modules ('nonsense'): this model has no such projection; try"),
    ("merge folder -o new", 1, "folder holds no adapters (adapter_config.json and adapter_model.safetensors), nor"),
    ("generate folder --prompt x", 1, "folder holds neither a model (config.json and model.safetensors) nor adapters"),
    ("export folder -o text.txt --format gguf", 2, "out (text.txt) is there already; --force replaces it"),
    ("export folder -o text.txt", 2, "out (text.txt) must be a directory for hf, and is a file"),
    ("export folder -o new --format gguf --quantize Q9", 2, "quantize ('Q9') must be F32, F16"),
    ("export folder -o new --format abic --dtype float16", 2, "dtype (float16) must be float32 for abic"),
    ("merge folder -o text.txt --to gguf", 2, "out (text.txt) is there already; --force replaces it"),
    ("merge folder -o new --quantize Q9", 2, "quantize ('Q9') must be F32, F16"),
    ("runs text.txt", 2, "Directory 'text.txt' is a file"),
    ("compare text.txt", 2, "RUN (text.txt) must be the directory of a run"),
    ("trai", 2, "unknown verb 'trai'"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "code", "sentence"), CALLS, ids=[call[0] for call in CALLS])
def test_a_wrong_call_says_what_where_and_how_else(abi_train, tmp_path, words, code, sentence):
    import shlex

    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    found, out, err = abi_train(*shlex.split(words))
    assert sentence in err
    assert (found, out) == (code, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*FILES, "folder"])


def test_there_are_forty():
    assert len(CALLS) >= 40
