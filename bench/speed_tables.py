"""Write the tables of docs/5-speed.md from `bench/results/`, between their markers; `--check` only compares.

    python bench/speed_tables.py [--check]

    steps beside the peers'     from *-peers.csv, made by bench_vs_peers.py
    what is asked and reached   from *-goals.csv, made by goals.py
    quantised models            from *-llama-cpp.csv, made by bench_llama_cpp.py
    adapters                    from *-lora.csv, made by bench_lora.py
"""

import argparse
import csv
import sys
from pathlib import Path

from judging import figure, verdict
from shapes import SHAPES

from abi_py.kernels.engine.simd import ISAS

ROOT = Path(__file__).resolve().parents[1]
END = "<!-- end of measured -->"


Row = dict[str, str]
Pair = tuple[Row, Row]  # ours and the peer's, of one run


def latest_runs(path: Path) -> list[Pair]:
    """Return the newest measurement of each peer in each operation, by shape as in shapes.py, then as in the file.

    Every run begins with our own row, so a peer's row belongs to the last `abi_py` above it.
    """
    pairs: dict[tuple[str, str], Pair] = {}
    ours: Row = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["name"] == "abi_py":
                ours = row
            else:
                pairs[row["operation"], row["name"]] = (ours, row)
    shapes = list(SHAPES)
    return sorted(pairs.values(), key=lambda pair: shapes.index(pair[0]["operation"].split()[1]))


def percent(text: str | None) -> str:
    """Return "0.83" as "83%"; an empty cell stays empty."""
    return f"{float(text):.0%}" if text else ""


def line(ours: Row, peer: Row) -> str:
    """Return the line of one peer."""
    seconds = [f"{float(row['step_s']) * 1e3:,.1f} ms" for row in (ours, peer)]
    name = f"{peer['name']} {peer['version'].split()[-1]}"
    ratio = f"{float(peer['speed_ratio']):.2f}"
    if peer.get("lowest_ratio"):  # files of the first days lack it
        ratio += f" ({float(peer['lowest_ratio']):.2f} to {float(peer['highest_ratio']):.2f})"
    share = float(ours["peak_rss_mb"]) / float(peer["peak_rss_mb"])
    shape = ours["operation"].removeprefix("step ")
    cells = (shape, seconds[0], percent(ours.get("share_of_peak")), name, seconds[1], ratio, f"{share:.0%}")
    return f"| {' | '.join(cells)} |"


def table(path: Path) -> str:
    """Return the table of one machine as Markdown."""
    pairs = latest_runs(path)
    first = pairs[0][0]
    rounds = "/".join(sorted({ours["rounds"] for ours, _ in pairs}))
    dates = " and ".join(sorted({ours["date"] for ours, _ in pairs}))
    commits = ", ".join(sorted({ours["commit"] for ours, _ in pairs}))
    lines = [
        f"{_machine(first, path)}, {first['threads']} threads, medians of {rounds} rounds, taken in turn, "
        f"each in a process of its own (`{path.relative_to(ROOT)}`, {dates}, commits {commits}):",
        "",
        "| shape of `bench/shapes.py` | ours | of the peak | peer | its step | its step / ours (single rounds) "
        "| our peak memory / its |",
        "|---|---:|---:|---|---:|---:|---:|",
    ]
    return "\n".join(lines + [line(*pair) for pair in pairs])


def goals_table(path: Path) -> str:
    """Return the newest measurement of each goal on one machine as Markdown."""
    with path.open(newline="", encoding="utf-8") as file:
        newest = {row["what"]: row for row in csv.DictReader(file)}

    first = next(iter(newest.values()))
    dates = " and ".join(sorted({row["date"] for row in newest.values()}))
    lines = [
        f"{_machine(first, path)}, {first['threads']} threads (`{path.relative_to(ROOT)}`, {dates}):",
        "",
        "| goal | asked | measured | possible | |",
        "|---|---:|---:|---:|---|",
    ]
    for what, row in newest.items():
        keys = "asked", "measured", "possible"
        asked, measured, possible = (figure(float(row[key]), row["unit"]) if row[key] else "" for key in keys)
        said = "out of reach here" if row["bounded_by_machine"] and row["met"] == "no" else verdict(row)
        lines.append(f"| {what} | {row['rule']} {asked} | {measured} | {possible} | {said} |")
    return "\n".join(lines)


def quantised_table(path: Path) -> str:
    """Return the newest measurement of each model and type beside llama.cpp on one machine as Markdown."""
    with path.open(newline="", encoding="utf-8") as file:
        newest = {row["name"]: row for row in csv.DictReader(file)}
    first = next(iter(newest.values()))
    dates = " and ".join(sorted({row["date"] for row in newest.values()}))
    lines = [
        f"{_machine(first, path)}, {first['threads']} threads, medians of processes taken in turn "
        f"(`{path.relative_to(ROOT)}`, {dates}); each figure ours, then llama.cpp's, and their ratio:",
        "",
        "| model | file, MB | tokens/s of a prompt of 512 | tokens/s written | of the file, GB/s | peak memory, MB "
        "| start to first token, s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, ours in newest.items():
        model, _, who = name.rpartition(" ")
        if who != "abi_py":
            continue
        theirs = newest[f"{model} llama.cpp"]
        cells = [model, ours["file_mb"]]
        for key in ("prefill_tokens_per_s", "decode_tokens_per_s", "gb_per_s", "peak_rss_mb", "cold_s"):
            mine, other = float(ours[key]), float(theirs[key])
            ratio = f" ({mine / other:.2f})" if key != "gb_per_s" else ""
            cells.append(f"{mine:,.4g}; {other:,.4g}{ratio}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def adapters_table(path: Path) -> str:
    """Return the newest measurement of each kind of adapters' step on one machine as Markdown."""
    newest: dict[tuple[str, str], Row] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["of"]:  # files of the first days have no steps beside LoRA's
                newest[row["shape"], row["of"]] = row
    first = next(iter(newest.values()))
    dates = " and ".join(sorted({row["date"] for row in newest.values()}))
    lines = [
        f"{_machine(first, path)}, {first['threads']} threads, steps in turn (`{path.relative_to(ROOT)}`, {dates}):",
        "",
        "| shape of `bench/shapes.py`, rank | step | time | of a full step | of its operations | of LoRA's step "
        "| matrices, MB |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    sizes = list(SHAPES)
    for (shape, of), row in sorted(newest.items(), key=lambda each: sizes.index(each[0][0])):
        own = of in ("lora", "dora")
        name = {"lora": "LoRA", "dora": "DoRA", "peft": row["version"].partition(",")[0]}.get(of, f"LoRA on {of}")
        share = f"{float(row['step_ms']) / float(row['full_ms']):.3f}"
        operations = f"{float(row['share_of_operations']):.3f}" if own else ""
        cells = f"{shape}, {row['rank']}", name, f"{float(row['step_ms']):,.0f} ms", share, operations
        kept = f"{float(row['matrices_mb']):.1f}" if row["matrices_mb"] else ""
        lines.append(f"| {' | '.join((*cells, format(float(row['of_lora']), '.3f'), kept))} |")
    return "\n".join(lines)


def _machine(row: Row, path: Path) -> str:
    """Name the machine of a file: processors of different kinds may have one name."""
    return row["cpu"] + "".join(
        f" with {name}{' and AMX' if f'-{name}-amx-' in path.name else ''}" for name in ISAS if f"-{name}-" in path.name
    )


PAGE = "docs/5-speed.md"
TABLES = (  # the script that measures, the files, and what makes a table of one
    ("bench/bench_vs_peers.py", "*-peers.csv", table),
    ("bench/goals.py", "*-goals.csv", goals_table),
    ("bench/bench_llama_cpp.py", "*-llama-cpp.csv", quantised_table),
    ("bench/bench_lora.py", "*-lora.csv", adapters_table),
)


def filled(text: str) -> str:
    """Return the text of the page with the tables that the stored results give."""
    for script, files, make in TABLES:
        begin = f"<!-- measured by {script} -->"
        before, rest = text.split(begin)
        _, after = rest.split(END, 1)
        tables = "\n\n".join(make(path) for path in sorted((ROOT / "bench/results").glob(files)))
        text = f"{before}{begin}\n{tables}\n{END}{after}"
    return text


def main() -> int:
    """Write or compare; return 1 if `--check` finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    page = ROOT / PAGE
    found = page.read_text(encoding="utf-8")
    wanted = filled(found)
    if parser.parse_args().check:
        return int(found != wanted)
    page.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
