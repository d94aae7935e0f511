"""Figures of experiments: lines and points, as SVG that is the same for the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from equipoise.errors import EquipoiseError

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5",
           "#9c6b4e", "#9498a0")  # fmt: skip
"""Observable's ten, told apart by most colour-blind readers."""


def canvas(columns: int = 1, rows: int = 1, *, width: float = 8.0, height: float = 3.4) -> Any:
    """A figure and its axes [rows, columns]."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise EquipoiseError("figures need: pip install 'equipoise[lab]'.") from error
    mpl.use("Agg")
    from cycler import cycler  # comes with matplotlib
    from matplotlib import pyplot as plt

    mpl.rcParams.update(
        {
            "svg.hashsalt": "equipoise",
            "svg.fonttype": "none",
            "font.family": "sans-serif",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#e4e4e4",
            "axes.prop_cycle": cycler(color=list(COLOURS)),
            "legend.frameon": False,
            "figure.constrained_layout.use": True,
        }
    )
    return plt.subplots(rows, columns, figsize=(width, height * rows), squeeze=False)


def panels(count: int, *, width: float, height: float, columns: int = 3) -> Any:
    """A figure, and one axis each for so many panels, row by row."""
    wide = min(count, columns)
    figure, axes = canvas(wide, -(-count // wide), width=width, height=height)
    for axis in axes.flat[count:]:
        axis.remove()
    return figure, axes.flat[:count]


def save(figure: Any, path: Path) -> None:
    """Write an SVG, and close the figure."""
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    text = path.read_text(encoding="utf-8")
    path.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", encoding="utf-8")


def lines(
    axis: Any,
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    title: str,
    x: str,
    y: str,
    floor: float | None = None,
    log: bool = False,
    names: Sequence[str] = (),
) -> None:
    """One line a name; `floor` is drawn as what chance gives.

    names: of all panels of the figure, so that one name has one colour in each.
    """
    order = list(dict.fromkeys([*names, *curves]))
    for name, (xs, ys) in curves.items():
        number = order.index(name)
        colour = COLOURS[number % len(COLOURS)]
        dashes = "-" if number < 5 else "--"  # so that near colours can be told apart
        axis.plot(np.asarray(xs), np.asarray(ys), dashes, color=colour, label=name, linewidth=1.4)
    if floor is not None:
        axis.axhline(floor, color="#888888", linewidth=0.9, linestyle=":", label="chance")
    if log:
        axis.set_yscale("log")
        few_ticks(axis.yaxis)
    axis.set(title=title, xlabel=x, ylabel=y)


def few_ticks(axis: Any) -> None:
    """A logarithmic axis labelled at 1, 2 and 5 times the powers of ten."""
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def shares(axis: Any, tokens: ArrayLike, shares_NE: Any, *, title: str) -> None:
    """Shares of all experts over training, stacked to 1; no two experts have one colour."""
    shares_EN = np.asarray(shares_NE).T
    axis.stackplot(
        np.asarray(tokens),
        shares_EN,
        colors=_many(len(shares_EN)),
        edgecolor="white",  # with many experts neighbours have near colours
        linewidth=0.15,
    )
    axis.margins(x=0)
    axis.set(title=title, xlabel="million tokens", ylabel="share of selections", ylim=(0, 1))
    axis.grid(False)


def _many(count: int) -> Sequence[Any]:
    """So many colours from one map, which is continued between its entries."""
    from matplotlib import colormaps

    entries = np.arange(256)
    table = colormaps["turbo"](entries)
    places = np.linspace(0.05, 0.95, count) * entries[-1]
    colours = np.stack([np.interp(places, entries, channel) for channel in table.T], 1)
    return list(colours)


def legend(figure: Any, axes: Any, columns: int = 4) -> None:
    """One legend below all axes, each name once."""
    found: dict[str, Any] = {}
    for axis in np.atleast_1d(axes):
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    handles, names = list(found.values()), list(found)
    figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=8)
