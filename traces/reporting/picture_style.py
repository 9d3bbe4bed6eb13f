"""The one look of all pictures: figure, axes, colours, scales."""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator

INK, GREY, PALE = "#222222", "#8C8C8C", "#E4E4E4"
BANDS = ("#EDEDED", "#D6D6D6")
ACCENT = "#D55E00"
SHARES: Colormap = colormaps["viridis"]
# Without the palest blues: a bin with one value must differ from one with none.
COUNTS: Colormap = ListedColormap(colormaps["Blues"](np.linspace(0.15, 1.0, 256)))

# Okabe and Ito's palette without its yellow, too pale for a line; told apart by every kind of colour vision.
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", ":")

Look = tuple[str, str]
"""Colour and dashes of a line."""


def looks(n: int) -> list[Look]:
    """Looks of `n` lines; the first 21 all differ."""
    return [(_PALETTE[i % len(_PALETTE)], _DASHES[i // len(_PALETTE) % len(_DASHES)]) for i in range(n)]


def plain(text: str) -> str:
    """A text of somebody else's, not to be read as mathematics."""
    return text.replace("$", r"\$")


def new_figure(title: str, caption: str, size: tuple[float, float]) -> Figure:
    """A figure of `size` inches with its title above and where its numbers come from below."""
    engine = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.10, wspace=0.03, hspace=0.04)
    figure = Figure(figsize=size, layout=engine, facecolor="white")
    figure.suptitle(title, fontsize=16, fontweight="bold", color=INK, x=0.012, ha="left")
    figure.supxlabel(plain(caption), fontsize=10, color=GREY, x=0.012, ha="left")
    return figure


def style_axes(axes: Axes, title: str, x: str, y: str, *, grid: bool = True) -> None:
    """Set the title and the labels of both axes, units included, in the common look."""
    axes.set_title(plain(title), fontsize=12.5, color=INK, loc="left")
    axes.set_xlabel(x, fontsize=11.5, color=INK)
    axes.set_ylabel(y, fontsize=11.5, color=INK)
    axes.tick_params(labelsize=10.5, colors=INK, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(color=PALE, linewidth=0.8)


def add_legend(axes: Axes, of: Axes | None = None) -> None:
    """Name the labelled lines and bands of `axes` in its lower left; or those of `of`, in one row that fills `axes`."""
    named, columns = (axes, 1) if of is None else (of, 8)
    axes.legend(
        *named.get_legend_handles_labels(),
        loc="lower left",
        ncols=columns,
        fontsize=10.5,
        framealpha=0.9,
        edgecolor="none",
        labelcolor=INK,
        borderpad=0.2 if of else 0.4,
        borderaxespad=0 if of else 0.5,
    )


def add_colour_bar(figure: Figure, image: ScalarMappable, axes: Axes, label: str, *, below: bool = False) -> None:
    """Explain the colours of `image`; `below`: some values lie below the scale."""
    bar = figure.colorbar(image, ax=axes, extend="min" if below else "neither", fraction=0.05, pad=0.02)
    bar.set_label(label, fontsize=11.5, color=INK)
    bar.ax.tick_params(labelsize=10.5, colors=INK)
    bar.outline.set_visible(False)


def index_ticks(n: int) -> FixedLocator:
    """Ticks at whole numbers from 0 below `n`, at most 16 of them."""
    spacing = next(step for step in (1, 2, 4, 5, 10, 20, 50, 100, n) if n <= 16 * step)
    return FixedLocator(list(range(0, n, spacing)))
