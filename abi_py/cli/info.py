"""`abi-train info`: the defaults, this machine, and what the kernels make of it."""

import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from .. import __version__
from ..config import SECTIONS, fields_of
from ..fields import plain
from .console import make_console, show_table
from .describe import BF16_METHODS, cpu_name
from .options import Verb


@click.command(cls=Verb, example="abi-train info --json", short_help="Show the defaults and this machine.")
@click.option("--json", "as_json", is_flag=True, help="machine-readable")
def command(as_json: bool) -> None:
    """Show the defaults of all settings, and this machine: processor, threads, versions, kernels, cache, peak."""
    facts = {"machine": machine_facts(), "defaults": defaults()}
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    console = make_console()
    rows = [(name.replace("_", " "), str(value)) for name, value in facts["machine"].items()]
    show_table(console, "This machine", rows)
    for section, values in facts["defaults"].items():
        helps = {option.name: option.help for option in fields_of(SECTIONS[section])}
        settings = [(name, str(value), helps[name]) for name, value in values.items()]
        show_table(console, f"Defaults: {section.replace('_', ' ')}", settings, ("setting", "default", "meaning"))
    console.print("abi-train run has defaults of its own for a small model: abi-train run --help", soft_wrap=True)


def defaults() -> dict[str, dict[str, Any]]:
    """Return section -> field -> default as plain values."""
    values: dict[str, dict[str, Any]] = {}
    for section, cls in SECTIONS.items():
        options = fields_of(cls)
        if any(option.required for option in options):
            values[section] = {
                option.name: "required" if option.required else plain(option.default) for option in options
            }
        else:
            values[section] = cls().to_dict()
    return values


def multiplied(choice: Any) -> str:
    """Say how products of bfloat16, or of its parts, are made here, and what was measured of each way."""
    rates = ", ".join(f"{BF16_METHODS[name]} {rate / 1e9:.0f}" for name, rate in choice.rates.items())
    least = f"another way is taken if it is {choice.worth:g} times as fast as the first"
    measured = f" (tiles measured on one thread, GFLOP/s: {rates}; {least})" if rates else ""
    return BF16_METHODS[choice.method] + (given(choice.variable) or measured)


def given(variable: str) -> str:
    """Name a variable of the environment where it decides; "" where it is not set."""
    return f" ({variable})" if os.environ.get(variable) else ""


def tile() -> str:
    """Say which register tile float32 has here, and what was measured of each."""
    from ..kernels.engine.number_formats import FLOAT32, TILES

    rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in TILES.rates.items())
    measured = f" (measured on one thread, GFLOP/s: {rates})" if rates else ""
    return f"{FLOAT32.rows} x {FLOAT32.columns}" + (given("ABI_TILE") or measured)


def amx_state() -> str:
    """Say whether AMX can be used: the machine has it, the system gives it, and a few tiles are right."""
    from ..kernels.engine import amx
    from ..kernels.engine.jit import JIT
    from ..kernels.engine.number_formats import METHODS

    missing = METHODS["amx"].missing if JIT and "amx" in METHODS else amx.lacks()
    return f"no: {missing}" if missing else "there, permitted and tested" if JIT else "there"


def machine_facts() -> dict[str, Any]:
    """Return what matters for speed; measuring the two peaks takes a tenth of a second."""
    import numba

    from ..kernels import matmul
    from ..kernels.engine import simd
    from ..kernels.engine.cache import STORE
    from ..kernels.engine.jit import JIT
    from ..kernels.engine.number_formats import BF16X3, BF16X6, BFLOAT16, FLOAT32
    from ..kernels.engine.peak import measured_peak
    from ..runs.compiling import is_cached, kernel_names

    peaks = [round(measured_peak(0.05, one) / 1e9, 1) if JIT else None for one in (FLOAT32, BFLOAT16)]
    names = kernel_names()
    warm = sum(map(is_cached, names))
    facts = simd.describe()
    return {
        "abi_py": __version__,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": numba.get_num_threads(),
        "threading_layer": numba.threading_layer() if JIT else "none",
        "simd": facts["simd"],
        "widest_simd_of_the_host": facts["host"],
        "floats_in_a_vector": facts["lanes"],
        "tile": tile(),
        "products": ("Numba's kernels" if matmul.BACKEND == "numba" else "NumPy's") + given("ABI_MATMUL"),
        "compiled": JIT,
        "measured_peak_gflops": peaks[0],
        "measured_peak_bf16_gflops": peaks[1],
        "bf16": multiplied(BFLOAT16),
        "bf16x3": multiplied(BF16X3),
        "bf16x6": multiplied(BF16X6),
        "amx": amx_state(),
        "cache": str(STORE.directory),
        "kernels_in_the_cache": f"{warm} of {len(names)}",
        "python": sys.version.split()[0],
        **{name: _version(name) for name in ("numpy", "numba", "llvmlite", "safetensors", "tokenizers")},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
