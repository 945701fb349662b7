"""`abi-train warmup`: compile all kernels now, so that no run has to."""

import time

import click

from ..runs.compiling import compile_kernels, is_cached, kernel_names
from .options import Verb


@click.command(cls=Verb, example="abi-train warmup", short_help="Compile all kernels for this machine.")
def command() -> None:
    """Compile all kernels for this machine, one process for each core, and keep them in the cache."""
    from ..kernels.engine.cache import STORE
    from ..kernels.engine.jit import JIT

    if not JIT:
        click.echo("nothing to compile: NUMBA_DISABLE_JIT=1 runs the kernels as plain Python")
        return
    began = time.perf_counter()
    names = kernel_names()
    missing = [name for name in names if not is_cached(name)]
    if not missing:
        click.echo(f"all {len(names)} kernels are in {STORE.directory}")
        return
    click.echo(f"compiling {len(missing)} of {len(names)} kernels into {STORE.directory}")
    count = 0

    def done(name: str, seconds: float) -> None:
        nonlocal count
        count += 1
        click.echo(f"{count:3}/{len(missing)}  {name.strip('_'):<22} {seconds:5.1f} s")

    compile_kernels(missing, done)
    click.echo(f"done in {time.perf_counter() - began:.1f} s")
