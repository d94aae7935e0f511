"""The main figures as PNG and SVG for a paper or a slide, through matplotlib (extra `figures`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.errors import EquipoiseError
from equipoise.report import words
from equipoise.report.content import CHANCE, Content, gather

if TYPE_CHECKING:
    from equipoise.trace import Trace

Row = Mapping[str, Any]

INK, SOFT, GRID, ACCENT, GOOD, NEVER = (
    "#1a1f26",
    "#586472",
    "#e6e9ed",
    "#1668b8",
    "#14743f",
    "#d1006c",
)
LOADS = ("#1b4f93", "#5b93cf", "#abcbea", "#f1f2f3", "#f7cda3", "#de8733", "#944304")
"""From an eighth of a fair share over the fair share to eight times it; the page's colours."""

DOUBLINGS = 3
STYLE = {
    "font.size": 9,
    "font.family": "sans-serif",
    "text.parse_math": False,  # a dollar in a subject's name is a dollar
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "svg.fonttype": "none",
    "svg.hashsalt": "equipoise",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def write_figures(trace: Trace, folder: str | Path) -> list[Path]:
    """Write heatmap, MaxVio against floor, Lorenz curves and accuracy, each as .png and .svg.

    Figures without data (accuracy without questions, load of a dense model) are left out. Existing
    files are replaced. Returns the paths; raises EquipoiseError without matplotlib.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise EquipoiseError(
            'Figures need matplotlib, which is not installed: pip install "equipoise[figures]".'
        ) from error
    content = gather(trace)
    counted = [row for row in content.layers if row["max_vio"] is not None]
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    written = []
    with mpl.rc_context(STYLE):
        for name, draw, wanted in (
            ("load", draw_load, bool(counted)),
            ("max_vio", draw_max_vio, bool(counted)),
            ("lorenz", draw_lorenz, bool(counted)),
            ("accuracy", draw_accuracy, bool(content.accuracy)),
        ):
            if wanted:
                written += _save(draw, content, target / name)
    return written


def _save(draw: Callable[[Content], Any], content: Content, stem: Path) -> list[Path]:
    figure = draw(content)
    paths = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    figure.savefig(paths[0], dpi=200)
    figure.savefig(paths[1], metadata={"Date": None})
    return paths


def draw_load(content: Content) -> Any:
    """Layers x experts, log2 of the ratio to a fair share; never selected in its own colour."""
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Patch

    layers, widest = content.layers, max(row["experts"] for row in content.layers)
    ratio_LE = np.full((len(layers), widest), np.nan)
    for place, experts in enumerate(content.experts):
        ratio_LE[place, : len(experts)] = [row["ratio"] for row in experts]
    log_LE = np.log2(np.where(ratio_LE > 0, ratio_LE, np.nan))
    never_LE = np.ma.masked_where(ratio_LE != 0, np.ones_like(ratio_LE))
    figure, axes = _figure(7.2, min(max(1.5 + 0.13 * len(layers), 3.0), 9))
    colours = LinearSegmentedColormap.from_list("load", LOADS)
    kind: dict[str, Any] = {"aspect": "auto", "interpolation": "none"}
    image = axes.imshow(log_LE, cmap=colours, vmin=-DOUBLINGS, vmax=DOUBLINGS, **kind)
    axes.imshow(never_LE, cmap=LinearSegmentedColormap.from_list("never", [NEVER, NEVER]), **kind)
    _layer_ticks(axes.yaxis, content.labels, 24)
    axes.set(xlabel="expert", ylabel="layer", title=f"Load of every expert: {_short(content.name)}")
    bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=30, extend="both")
    bar.set_ticks(
        range(-DOUBLINGS, DOUBLINGS + 1), labels=["1/8", "1/4", "1/2", "1", "2", "4", "8"]
    )
    bar.set_label("times a fair share")
    bar.outline.set_visible(False)
    if never_LE.count():
        patch = Patch(color=NEVER, label=f"never selected ({never_LE.count()})")
        figure.legend(handles=[patch], loc="outside lower left", frameon=False)
    return figure


def draw_max_vio(content: Content) -> Any:
    """MaxVio of each layer with its interval, above what chance alone gives."""
    figure, axes = _figure(7.2, 3.0)
    places = range(len(content.layers))
    known = [
        (x, row)
        for x, row in zip(places, content.layers, strict=True)
        if row["max_vio"] is not None
    ]
    edges = [x + side for x, _ in known for side in (-0.5, 0.5)]
    limit = [row["max_vio_floor_95"] for _, row in known for _ in (0, 1)]
    floor = [row["max_vio_floor"] for _, row in known for _ in (0, 1)]
    axes.fill_between(edges, 0, limit, color="#dfe3e8", lw=0, label="chance alone (95 %)")
    axes.plot(edges, floor, color=SOFT, lw=1, label="floor: mean of chance")
    for x, row in known:
        if row["max_vio_interval"]:
            axes.plot([x, x], row["max_vio_interval"], color=ACCENT, lw=1.2, alpha=0.8)
    xs, values = [x for x, _ in known], [row["max_vio"] for _, row in known]
    axes.plot(xs, values, "o", ms=4, color=ACCENT, label="measured, 95 % interval")
    if max(values) > 25 * min(floor) > 0:
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(floor) / 1.6)
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=GRID, lw=0.6)
    axes.set_axisbelow(True)
    _layer_ticks(axes.xaxis, content.labels, 30)
    axes.set(
        xlabel="layer", ylabel="MaxVio", title=f"Imbalance against chance: {_short(content.name)}"
    )
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def draw_lorenz(content: Content) -> Any:
    """Lorenz curve of every layer; the least and the most even are named."""
    import numpy as np

    figure, axes = _figure(4.2, 4.4)
    known = [
        p for p in zip(content.labels, content.layers, strict=True) if p[1]["max_vio"] is not None
    ]
    ranked = sorted(known, key=lambda pair: float(pair[1]["gini"]))
    named = {ranked[0][0]: (GOOD, "most even"), ranked[-1][0]: (ACCENT, "least even")}
    for label, row in ranked:
        counts = np.sort(row["counts"])
        curve = np.concatenate([[0.0], np.cumsum(counts) / counts.sum()])
        colour, word = named.get(label, (SOFT, ""))
        text = f"layer {label}, {word} (Gini {row['gini']:.3f})" if word else None
        strength = {"lw": 1.8, "alpha": 1.0} if word else {"lw": 0.7, "alpha": 0.35}
        axes.plot(np.linspace(0, 1, len(curve)), curve, color=colour, label=text, **strength)
    axes.plot([0, 1], [0, 1], ls=(0, (4, 3)), color=SOFT, lw=0.9, label="all alike")
    axes.set(
        xlim=(0, 1),
        ylim=(0, 1),
        aspect="equal",
        xlabel="part of the experts, least used first",
        ylabel="part of the selections",
        title="Who carries the load",
    )
    axes.grid(color=GRID, lw=0.6)
    axes.legend(loc="upper left", frameon=False)
    return figure


def draw_accuracy(content: Content) -> Any:
    """Accuracy by subject and category with exact intervals, against guessing."""
    rows = content.accuracy
    figure, axes = _figure(6.4, 1.1 + 0.17 * len(rows))
    for place, row in enumerate(rows):
        low, high = row["interval"]
        colour = SOFT if low <= CHANCE <= high else ACCENT
        axes.plot([low, high], [place, place], color=colour, lw=1.2, alpha=0.8)
        axes.plot(row["accuracy"], place, "o", ms=4, color=colour)
    axes.axvline(CHANCE, color=SOFT, lw=0.9, ls=(0, (4, 3)))
    axes.set_yticks(
        range(len(rows)), labels=[words.line(row["name"]).replace("_", " ") for row in rows]
    )
    for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("normal" if row["kind"] == "subject" else "bold")
    axes.set(xlim=(0, 1), ylim=(len(rows) - 0.5, -0.5), title=f"Accuracy: {_short(content.name)}")
    axes.set_xlabel("right answers; 95 % intervals; dashed: guessing among four")
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.grid(axis="x", color=GRID, lw=0.6)
    return figure


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure of so many inches with one pair of axes; no pyplot, hence no global state."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    figure = Figure(figsize=(width, height), layout=layout)
    return figure, figure.add_subplot()


def _layer_ticks(axis: Any, labels: Sequence[str], most: int) -> None:
    every = -(-len(labels) // most)
    places = range(0, len(labels), every)
    axis.set_ticks(list(places), labels=[labels[place] for place in places])


def _short(name: str) -> str:
    return name if len(name) <= 48 else f"...{name[-45:]}"
