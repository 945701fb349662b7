"""Write the speed table of the README from `bench/results/`, between its two markers; `--check` only compares.

    python bench/readme_table.py [--check]
"""

import argparse
import csv
import sys
from pathlib import Path

from shapes import SHAPES

from abi_py.kernels.simd import ISAS

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- measured by bench/bench_vs_peers.py -->", "<!-- end of measured -->"


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
    vectors = "".join(f" with {name}" for name in ISAS if f"-{name}-" in path.name)
    lines = [
        f"{first['cpu']}{vectors}, {first['threads']} threads, medians of {rounds} rounds, taken in turn, "
        f"each in a process of its own (`{path.relative_to(ROOT)}`, {dates}, commits {commits}):",
        "",
        "| shape of `bench/shapes.py` | ours | of the peak | peer | its step | its step / ours (single rounds) "
        "| our peak memory / its |",
        "|---|---:|---:|---|---:|---:|---:|",
    ]
    return "\n".join(lines + [line(*pair) for pair in pairs])


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
