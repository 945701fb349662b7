"""Tokenizing a large text: `tokenize_to_file` beside the tokenizers library, driven directly.

    python bench/bench_tokenize.py --megabytes 200 --rounds 3

The library is driven as a short script would: read lines, encode_batch of some thousand of them, ids to a file.  Two
forms of it: `lines`, one call with the same lines; `fast`, the same with encode_batch_fast, which keeps no positions.
The text is generated once; each run has a process of its own, in turn, so that its peak memory is its own.  First, both
are checked on the beginning of the text: same ids but for what the library loses by cutting at every line.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _bench import header, run_script, save_rows

from abi_py.data import TokenizeConfig, Tokenizer, tokenize_to_file, train_tokenizer

BATCH_BYTES = 1 << 20
KINDS = ("ours", "lines", "fast")


def generate(path, megabytes):
    """Write text of made-up words: 60 000 of them, drawn as Zipf's law has it, in lines of some 12 words."""
    random = np.random.default_rng(0)
    sounds = [
        "ka",
        "lo",
        "mi",
        "ter",
        "shan",
        "e",
        "ing",
        "no",
        "u",
        "st",
        "re",
        "al",
        "qui",
        "ed",
        "\u00e9",
        "\u03bb",
        "on",
        "7",
    ]
    words = ["".join(random.choice(sounds, random.integers(1, 6))) for _ in range(60_000)]
    share = 1 / np.arange(1, len(words) + 1)
    share /= share.sum()
    ends = np.array([" ", " ", " ", " ", " ", " ", " ", ", ", ". ", "\n", "\n", ".\n\n    "])
    with path.open("w", encoding="utf-8", newline="") as file:
        size = 0
        while size < megabytes * 1e6:
            chosen = random.choice(len(words), 20_000, p=share)
            text = "".join(
                words[w] + ends[e] for w, e in zip(chosen, random.integers(0, len(ends), 20_000), strict=True)
            )
            size += len(text.encode())
            file.write(text)


def library(text, output, tokenizer, fast):
    """Drive the library directly, with the lines of the text; return the number of ids."""
    encode = tokenizer.backend.encode_batch_fast if fast else tokenizer.backend.encode_batch
    count = 0
    with text.open(encoding="utf-8", newline="") as source, output.open("wb") as file:
        while lines := source.readlines(BATCH_BYTES):
            for encoding in encode(lines, add_special_tokens=False):
                ids = np.array(encoding.ids, np.uint32)
                count += len(ids)
                file.write(ids.tobytes())
    return count


def peak_megabytes():
    """Return the most memory this process has had; getrusage would count that of the process which started it."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    return int(found[1]) / 1024


def worker(kind, folder):
    """Tokenize once; print seconds, tokens and peak memory."""
    text, output = folder / "text.txt", folder / f"{kind}.bin"
    tokenizer = Tokenizer.load(folder)
    began, worked = time.perf_counter(), time.process_time()
    if kind == "ours":
        tokens = tokenize_to_file([text], output, TokenizeConfig(tokenizer=str(folder))).tokens
    else:
        tokens = library(text, output, tokenizer, kind == "fast")
    seconds, worked = time.perf_counter() - began, time.process_time() - worked
    print(json.dumps({"seconds": seconds, "cpu_seconds": worked, "tokens": tokens, "peak_mb": peak_megabytes()}))


def check(folder):
    """Compare with the whole beginning of the text encoded in one call; return its number of bytes."""
    tokenizer = Tokenizer.load(folder)
    with (folder / "text.txt").open(encoding="utf-8", newline="") as file:
        text = file.read(1_000_000)
    (folder / "small.txt").write_text(text, encoding="utf-8", newline="")
    tokenize_to_file([folder / "small.txt"], folder / "small.bin", TokenizeConfig(tokenizer=str(folder)))
    wanted = [*tokenizer.backend.encode(text, add_special_tokens=False).ids, tokenizer.eos_id]
    if not np.array_equal(np.fromfile(folder / "small.bin", "<u4"), wanted):
        sys.exit("error: the ids are not those of the whole text; run the tests in tests/data/test_pieces.py")
    return len(text.encode())


def main():
    """Generate, check, measure in turn, print a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=8000)
    parser.add_argument("--folder", type=Path, help="where the text goes; it is removed at the end  [a temporary one]")
    parser.add_argument("--save", action="store_true", help="add the rows to bench/results/<machine>-tokenize.csv")
    parser.add_argument("--worker", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.folder)
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        return measure(Path(name), arguments)


def measure(folder, arguments):
    """Do it in a folder that is removed afterwards."""
    text = folder / "text.txt"
    generate(text, arguments.megabytes)
    with text.open(encoding="utf-8") as file:
        train_tokenizer(file.readlines(3_000_000), arguments.vocab_size).save(folder)
    print(f"checked: {check(folder):,} bytes, the same ids as in one call")
    size = text.stat().st_size
    runs = {kind: [] for kind in KINDS}
    for _ in range(arguments.rounds):
        for kind in KINDS:
            words = [sys.executable, __file__, "--worker", kind, "--folder", str(folder)]
            runs[kind].append(json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout))
    facts, rows = header("tokenize", os.cpu_count()), []
    print(", ".join(f"{name} {value}" for name, value in facts.items() if name != "operation"))
    print(f"{size / 1e6:.0f} MB of text, medians of {arguments.rounds} runs in turn")
    ours = statistics.median(run["seconds"] for run in runs["ours"])
    for kind in KINDS:
        seconds = statistics.median(run["seconds"] for run in runs[kind])
        worked = statistics.median(run["cpu_seconds"] for run in runs[kind])
        peak = max(run["peak_mb"] for run in runs[kind])
        rows.append(
            {
                **facts,
                "kind": kind,
                "megabytes": round(size / 1e6),
                "seconds": round(seconds, 2),
                "cpu_seconds": round(worked, 2),
                "mb_per_second": round(size / 1e6 / seconds, 2),
                "factor": round(seconds / ours, 2),
                "tokens": runs[kind][0]["tokens"],
                "peak_mb": round(peak),
            }
        )
        row = "{kind:<6} {seconds:>8.2f} s (processor {cpu_seconds:>8.2f} s) {mb_per_second:>7.2f} MB/s"
        rest = "  its time / ours {factor:>5.2f}  {tokens:>12,} tokens  peak {peak_mb:,} MB"
        print((row + rest).format(**rows[-1]))
    if arguments.save:
        save_rows(rows, "-tokenize")
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    run_script(main)
