"""Write the speed table of the README from `bench/results/`, between its two markers; `--check` only compares.

    python bench/readme_table.py [--check]
"""

import argparse
import csv
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- measured by bench/bench_vs_peers.py -->", "<!-- end of measured -->"


def latest_runs(path: Path) -> list[list[dict[str, str]]]:
    """Return the rows of the newest run of each operation in a results file, in the order of the file."""
    runs: dict[str, list[dict[str, str]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["name"] == "abi_py":  # every run begins with our own row
                runs.pop(row["operation"], None)
            runs.setdefault(row["operation"], []).append(row)
    return list(runs.values())


def table(path: Path) -> str:
    """Return the table of one machine as Markdown."""
    runs = latest_runs(path)
    first = runs[0][0]
    rounds = "/".join(sorted({run[0]["rounds"] for run in runs}))
    lines = [
        f"{first['cpu']}, {first['threads']} threads, medians of {rounds} rounds in turn, each in a process of its own "
        f"(`{path.relative_to(ROOT)}`, commits {', '.join(sorted({run[0]['commit'] for run in runs}))}):",
        "",
        "| shape of `bench/shapes.py` | ours | peer | its step | its step / ours | our peak memory / its |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for ours, *peers in runs:
        shape = ours["operation"].removeprefix("step ")
        for peer in peers:
            seconds = [f"{float(row['step_s']) * 1e3:,.1f} ms" for row in (ours, peer)]
            share = float(ours["peak_rss_mb"]) / float(peer["peak_rss_mb"])
            name = f"{peer['name']} {peer['version'].split()[-1]}"
            ratio = float(peer["speed_ratio"])
            lines.append(f"| {shape} | {seconds[0]} | {name} | {seconds[1]} | {ratio:.2f} | {share:.0%} |")
    return "\n".join(lines)


def readme() -> tuple[str, str]:
    """Return the README as it is and as it should be."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    tables = "\n\n".join(table(path) for path in sorted((ROOT / "bench/results").glob("*-peers.csv")))
    return text, f"{before}{BEGIN}\n{tables}\n{END}{after}"


def main() -> int:
    """Write or compare; return 1 if `--check` finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    found, wanted = readme()
    if parser.parse_args().check:
        return int(found != wanted)
    (ROOT / "README.md").write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
