"""Drawing a figure: histograms of the scales of each layer, and the outliers of each layer."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from teq.report.figure import Figure, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 80
NEAR = (0.75, 1.25)  # the range in which the paper finds most scales
GREY = "#767676"  # legible on white and on black
COLOURED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")


def rebinned(histogram: Mapping[str, Any], edges: np.ndarray) -> np.ndarray:
    """Return the counts of a histogram in other bins, each of its own spread evenly over its width.

    edges: `[n + 1]`, ascending. Returns `[n]`; what lies outside the edges is left out. A histogram of one
    value (lowest = highest) falls into one bin whole.
    """
    counts = np.asarray(histogram["counts"], dtype=np.float64)
    lowest, highest = histogram["lowest"], histogram["highest"]
    if highest <= lowest:
        return np.histogram([lowest], edges, weights=[counts.sum()])[0]
    own = np.linspace(lowest, highest, len(counts) + 1)
    below = np.concatenate([[0.0], np.cumsum(counts)])
    return np.diff(np.interp(edges, own, below))


def draw(figure: Figure) -> dict[str, bytes]:
    """Return the figure as `svg` and `png`, the same bytes for the same records; empty without any record."""
    shown = [panel for panel in figure.panels if panel.match is not None]
    return _drawn(shown, figure.name, ("svg", "png")) if shown else {}


def panels(figure: Figure) -> list[bytes]:
    """Return each panel that has a record as an `svg` of its own."""
    shown = [panel for panel in figure.panels if panel.match is not None]
    return [_drawn([panel], f"{figure.name}.{i}", ("svg",))["svg"] for i, panel in enumerate(shown)]


def _drawn(panels: Sequence[Panel], salt: str, kinds: Sequence[str]) -> dict[str, bytes]:
    import matplotlib
    from matplotlib.figure import Figure as Canvas
    from matplotlib.gridspec import GridSpec

    style = {
        "svg.hashsalt": salt,
        "svg.fonttype": "none",
        "font.family": "DejaVu Sans",
        "font.size": 9,
        **dict.fromkeys(COLOURED, GREY),
    }
    metadata = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}
    with matplotlib.rc_context(style):
        columns = min(len(panels), 2)
        rows = -(-len(panels) // columns)
        width, height = 4.6 * columns, 3.9 * rows
        canvas = Canvas(figsize=(width, height))
        # margins in inches; matplotlib's own layout engines give other last digits from process to process
        margins = {"left": 0.65 / width, "right": 1 - 0.15 / width, "top": 1 - 0.3 / height}
        grid = GridSpec(rows, columns, canvas, bottom=0.5 / height, wspace=0.25, hspace=0.35, **margins)
        for cell, panel in zip(grid, panels, strict=False):
            parts = cell.subgridspec(2, 1, height_ratios=[3, 1], hspace=0.4)
            _histogram(canvas.add_subplot(parts[0]), panel)
            _outliers(canvas.add_subplot(parts[1]), panel)
        out = {}
        for kind in kinds:
            buffer = io.BytesIO()
            canvas.savefig(buffer, format=kind, metadata=metadata[kind], transparent=kind == "svg", dpi=120)
            out[kind] = buffer.getvalue()
    return out


def _histogram(axes: "Axes", panel: Panel) -> None:
    edges = _edges(panel)
    for layer, colour in zip(panel.layers, _colours(len(panel.layers)), strict=True):
        counts = sum(
            (rebinned(summary["s"], edges) for index, summary in panel.sites if index == layer.index),
            np.zeros(len(edges) - 1),
        )
        axes.stairs(counts, edges, color=colour, linewidth=0.8, alpha=0.8)
    axes.axvspan(*NEAR, color=GREY, alpha=0.15, linewidth=0)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    axes.set_title(f"{panel.model} {panel.grid}", fontsize=10)
    axes.set_xlabel("scale")
    axes.set_ylabel("scales of a layer")


def _outliers(axes: "Axes", panel: Panel) -> None:
    shares = [100 * (1 - layer.near) for layer in panel.layers]
    axes.bar([layer.index for layer in panel.layers], shares, color=_colours(len(shares)), width=0.9)
    axes.set_xlabel("layer")
    axes.set_ylabel("outside, %")


def _edges(panel: Panel) -> np.ndarray:
    """Return bins over all of a panel's scales, outliers included."""
    lowest = min(summary["s"]["lowest"] for _, summary in panel.sites)
    highest = max(summary["s"]["highest"] for _, summary in panel.sites)
    if highest <= lowest:
        return np.linspace(lowest - 0.5, lowest + 0.5, BINS + 1)
    return np.linspace(lowest, highest, BINS + 1)


def _colours(count: int) -> list[str]:
    """Return colours from dark (the first layer) to light (the last), which the colour-blind can order."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["viridis"](0.9 * i / max(count - 1, 1))) for i in range(count)]
