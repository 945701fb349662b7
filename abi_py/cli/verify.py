"""`abi-train verify`: the gradient checks, on this machine."""

import time

import click

from ..runs.compiling import kernel_names
from .compiling import compile_showing
from .console import make_console, say
from .describe import describe_machine
from .options import Verb


@click.command(cls=Verb, example="abi-train verify", short_help="Check every kernel and gradient on this machine.")
@click.option("--seed", type=click.IntRange(min=0), default=None, help="seed of the random inputs")
@click.pass_context
def command(ctx: click.Context, seed: int | None) -> None:
    """Check each kernel against its reference, each reference against finite differences, and each tensor's gradient.

    The exit code is 1 if a check fails.
    """
    from rich.table import Table
    from rich.text import Text

    console = make_console()
    say(console, "machine", describe_machine())
    compile_showing(kernel_names(), console, lambda text: say(console, "compile", text))
    from ..verification import SEED, checks

    began = time.perf_counter()
    found = list(checks(SEED if seed is None else seed))
    for group in dict.fromkeys(check.group for check in found):
        table = Table(title=f"{group.capitalize()}", title_justify="left", title_style="bold")
        table.add_column("kernel" if group == "kernels" else "tensor")
        table.add_column("check")
        table.add_column("error", justify="right")
        table.add_column("allowed", justify="right")
        table.add_column("")
        for check in found:
            if check.group == group:
                verdict = Text("PASS", "green") if check.passed else Text("FAIL", "bold red")
                table.add_row(check.name, check.what, f"{check.error:.1e}", f"{check.tolerance:.0e}", verdict)
        console.print(table)
    failed = sum(not check.passed for check in found)
    seconds = time.perf_counter() - began
    console.print(
        f"{len(found) - failed} of {len(found)} checks passed in {seconds:.1f} s", style="red" if failed else "green"
    )
    ctx.exit(1 if failed else 0)
