"""Curves in a file, SVG or PNG: the one place that knows matplotlib, which is loaded only here (the extra `plot`)."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from ..files import atomic_file

__all__ = ["Curve", "Panel", "check_plot", "draw"]

FORMATS = (".svg", ".png")
WIDTH, HEIGHT = 6.4, 3.6  # inches of one panel
DOTS = 150  # to the inch, in a PNG


@dataclass(frozen=True)
class Curve:
    """Values over places; a NaN is a gap.  Curves of one colour belong together, and are named once in the legend."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int
    style: str = "-"
    points: bool = False  # mark each value: there are few
    faint: bool = False  # behind the others, and not in the legend


@dataclass(frozen=True)
class Panel:
    """Curves that share a scale."""

    title: str  # of the values
    curves: Sequence[Curve]
    limits: tuple[float, float] | None = None
    height: float = 1.0  # beside the others


def check_plot(path: Path) -> None:
    """Raise ConfigError if a file of that name cannot be drawn: its ending, its directory, or matplotlib is missing."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"plot ({path}) must end in {' or '.join(FORMATS)}; give such a name")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"plot ({path}) must be in a directory that is there; make {path.absolute().parent}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("plot needs matplotlib; run pip install 'abi_py[plot]'") from None


def draw(path: Path, panels: Sequence[Panel], axis: str) -> None:
    """Draw the panels below each other over one axis; the same curves give the same bytes of an SVG.

    ConfigError as by `check_plot`; OSError passes through.
    """
    check_plot(path)
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kind = path.suffix.lower().removeprefix(".")
    colours = {curve.colour for panel in panels for curve in panel.curves}
    palette = matplotlib.colormaps["tab10" if len(colours) <= 10 else "turbo"]

    def colour(number: int) -> object:
        return palette(number) if len(colours) <= 10 else palette(0.05 + 0.9 * number / max(colours))

    settings = {"svg.hashsalt": "abi_py"}  # the same picture for the same numbers
    with matplotlib.rc_context(settings), io.BytesIO() as drawn:  # type: ignore[arg-type]
        heights = [panel.height for panel in panels]
        figure = Figure(figsize=(WIDTH, HEIGHT * sum(heights) ** 0.8), layout="constrained")
        FigureCanvasAgg(figure)
        rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for panel, axes in zip(panels, rows):
            for curve in panel.curves:
                look = {"color": colour(curve.colour), "linestyle": curve.style, "linewidth": 1.5}
                look |= {"alpha": 0.25, "linewidth": 0.8} if curve.faint else {"label": curve.label}
                look |= {"marker": "o", "markersize": 3.5} if curve.points or len(curve.x) == 1 else {}
                axes.plot(curve.x, curve.y, **look)
            axes.set_ylabel(panel.title)
            if panel.limits is not None:
                axes.set_ylim(*panel.limits)
            axes.grid(alpha=0.3)
        rows[-1].set_xlabel(axis)
        few, some = len(colours) <= 5, len(colours) <= 10
        rows[0].legend(fontsize="medium" if few else "small" if some else "xx-small", ncols=1 if some else 2)
        figure.savefig(drawn, format=kind, dpi=DOTS, metadata={"Date": None} if kind == "svg" else None)
        with atomic_file(path) as file:
            file.write(drawn.getvalue())
