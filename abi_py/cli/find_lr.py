"""`abi-train run --find-lr`: a learning-rate range test on a run's own model and data.  Nothing is written."""

import dataclasses
import json
from typing import TYPE_CHECKING

from ..errors import counted
from ..runs.run import Run
from .compiling import prepare_training
from .console import say, stderr_console
from .training import show_head

if TYPE_CHECKING:
    from rich.console import Console

    from ..training.range_test import RangeTest

__all__ = ["find_and_show"]

LINES = 20  # of the plot
WIDTH = 40  # of a bar


def find_and_show(run: Run, console: "Console", as_json: bool, steps: int = 100) -> None:
    """Sweep the rate in so many steps, and print the losses as bars and the suggestion; or all of it as JSON."""
    from ..training.range_test import find_learning_rate
    from ..training.report import plain

    beside = stderr_console() if as_json else console
    show_head(run, beside)
    model = run.make_model()
    prepare_training(model, run.config.training, beside, lambda text: say(beside, "compile", text), decodes=False)
    found = find_learning_rate(model, run.config.training, run.train, steps=steps)
    if as_json:
        print(json.dumps(plain(dataclasses.asdict(found))))
        return
    for line in plot(found):
        console.print(line, markup=False, highlight=False)
    end = f"diverged after {found.rates[-1]:.3g}" if found.diverged else f"up to {found.rates[-1]:.3g}"
    made = counted(len(found.rates), "step")
    say(console, "swept", f"{made} from {found.rates[0]:.3g}, {end}; {found.seconds:.0f} s")
    if found.suggestion is None:
        say(console, "rate", "no suggestion: the loss fell at no rate; look at the data, or take a larger batch")
    else:
        say(console, "rate", f"--lr {found.suggestion:.2g} (where the loss falls fastest)")
    say(console, "find lr", "nothing was written")


def plot(found: "RangeTest") -> list[str]:
    """Return a bar of the smoothed loss for every few rates, the one nearest to the suggestion marked.

    The bars begin at the lowest loss: from zero on, all would look alike.
    """
    if not found.rates:
        return []
    every = -(-len(found.rates) // LINES)
    places = [*range(0, len(found.rates), every)]
    marked = None
    if found.suggestion is not None:
        at = found.rates.index(found.suggestion)
        marked = min(places, key=lambda place: abs(place - at))
    shown = [found.smoothed[place] for place in places]
    least, span = min(shown), max(shown) - min(shown)
    lines = []
    for place in places:
        loss = found.smoothed[place]
        bar = "#" * max(1, round(WIDTH * (loss - least) / span) if span else WIDTH)
        mark = "  <- here" if place == marked else ""
        lines.append(f"{found.rates[place]:9.2e}  {bar:<{WIDTH}} {loss:8.4f}{mark}")
    return lines
