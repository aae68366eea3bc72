"""Figures: histograms of trained scales from the bins that records keep, and the numbers behind them."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from teq.report.layout import Layout
from teq.report.match import Found, Library
from teq.report.table import grid_name
from teq.spec import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from teq.config import Job

NEAR = "[0.75, 1.25]"  # the range around the start that a record's `near` counts
BINS = 80
INSIDE = 0.001  # the part of the scales at either end that the horizontal axis leaves out
GREY = "#767676"  # legible on white and on black
COLOURED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")


@dataclass(frozen=True)
class Layer:
    """One layer's scales: how many, the share within NEAR of their start, and the mean of |log2(s / s0)|."""

    index: int
    channels: int
    near: float
    movement: float


@dataclass(frozen=True)
class Panel:
    """One run's scales; `found` is None where it has not run."""

    model: str
    grid: str
    jobs: Sequence["Job"]
    found: Found | None

    @cached_property
    def sites(self) -> list[tuple[int, Mapping[str, Any]]]:
        """Layer index and summary of each site, first to last."""
        scales = self.found.record.data["training"]["scales"] if self.found else {}
        layered = [(_layer(site), summary) for site, summary in scales.items()]
        return sorted(layered, key=lambda entry: entry[0])

    @cached_property
    def layers(self) -> list[Layer]:
        """The layers, first to last."""
        grouped: dict[int, list[Mapping[str, Any]]] = {}
        for index, summary in self.sites:
            grouped.setdefault(index, []).append(summary)
        layers = []
        for index, summaries in grouped.items():
            channels = [summary["channels"] for summary in summaries]
            near = math.fsum(s["near"] * n for s, n in zip(summaries, channels, strict=True)) / sum(channels)
            moved = math.fsum(_movement(s["moved"]) * n for s, n in zip(summaries, channels, strict=True))
            layers.append(Layer(index, sum(channels), near, moved / sum(channels)))
        return layers

    @property
    def near(self) -> float:
        """The share of all scales within NEAR of their start."""
        return math.fsum(layer.near * layer.channels for layer in self.layers) / sum(
            layer.channels for layer in self.layers
        )

    @property
    def thirds(self) -> tuple[float, float, float]:
        """Mean movement of the first, middle and last third of the layers."""
        parts = np.array_split(np.array([layer.movement for layer in self.layers]), 3)
        first, middle, last = (float(part.mean()) if len(part) else math.nan for part in parts)
        return first, middle, last

    @property
    def outlying(self) -> list[Layer]:
        """The layers with the largest share of scales outside NEAR, at most three, none without any."""
        ranked = sorted(self.layers, key=lambda layer: (layer.near, layer.index))
        return [layer for layer in ranked[:3] if layer.near < 1]


@dataclass(frozen=True)
class Figure:
    """The panels of an experiment."""

    name: str
    layout: Layout
    panels: Sequence[Panel]

    def used(self) -> list[Found]:
        """Every record that some panel shows."""
        return [panel.found for panel in self.panels if panel.found is not None]


def fill(name: str, layout: Layout, jobs: Sequence["Job"], library: Library) -> Figure:
    """The panels of `layout` for the runs of `jobs`: for a model in `layout.panels` at its grid alone."""
    chosen = layout.panels or {}
    panels: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        model, grid = job.run.model.name, grid_name(job.run.quantizer.grid)
        if chosen.get(model, grid) == grid:
            panels.setdefault((model, grid), []).append(job)
    if not panels:
        wanted = ", ".join(f"{model} at {grid}" for model, grid in chosen.items())
        raise UserError(f"experiments/{name}.yaml: no run of the sweep is one of its panels: {wanted}")
    found = {
        place: library.find(alike[0].run, set(), fixed=("transform.init",)) for place, alike in panels.items()
    }
    return Figure(
        name,
        layout,
        [
            Panel(*place, alike, one if (one := found[place]) and _scales(one) else None)
            for place, alike in panels.items()
        ],
    )


def numbers(figure: Figure) -> list[list[str]]:
    """A header and a row for each panel: what the paper observes about its figure, in numbers."""
    header = ["model", "grid", f"within {NEAR}", "outliers most in layer", "movement: first third", "middle"]
    rows = [[*header, "last third", "middle moves least"]]
    for panel in figure.panels:
        if panel.found is None:
            rows.append([panel.model, panel.grid, *["–"] * 6])
            continue
        worst = ", ".join(f"{layer.index} ({1 - layer.near:.1%})" for layer in panel.outlying)
        least = "yes" if panel.thirds[1] == min(panel.thirds) else "no"
        moves = [f"{part:.4f}" for part in panel.thirds]
        if len(panel.layers) < 3:
            least, moves = "–", ["–"] * 3
        rows.append([panel.model, panel.grid, f"{panel.near:.2%}", worst or "none", *moves, least])
    return rows


def by_layer(figure: Figure) -> list[list[str]]:
    """A header and a row for each layer of each panel."""
    rows = [["model", "grid", "layer", "scales", "share_near_start", "mean_abs_log2_movement", "record"]]
    for panel in figure.panels:
        for layer in panel.layers:
            place = [panel.model, panel.grid, str(layer.index), str(layer.channels)]
            stem = panel.found.record.file.stem if panel.found else ""
            rows.append([*place, f"{layer.near:.8g}", f"{layer.movement:.8g}", stem])
    return rows


def rebinned(histogram: Mapping[str, Any], edges: np.ndarray) -> np.ndarray:
    """The counts of a record's histogram in other bins: each of its own bins spread evenly over its width.

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
    """The figure as `svg` and `png`, byte for byte the same for the same records and matplotlib; empty
    without any record.
    """
    shown = [panel for panel in figure.panels if panel.found is not None]
    if not shown:
        return {}
    import matplotlib
    from matplotlib.figure import Figure as Canvas
    from matplotlib.gridspec import GridSpec

    style = {
        "svg.hashsalt": figure.name,
        "svg.fonttype": "none",
        "font.family": "DejaVu Sans",
        "font.size": 9,
        **dict.fromkeys(
            ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), GREY
        ),
    }
    with matplotlib.rc_context(style):
        columns = min(len(shown), 2)
        rows = -(-len(shown) // columns)
        width, height = 4.6 * columns, 3.9 * rows
        canvas = Canvas(figsize=(width, height))
        # margins in inches; matplotlib's own layout engines give other last digits from process to process
        margins = {"left": 0.65 / width, "right": 1 - 0.15 / width, "top": 1 - 0.3 / height}
        grid = GridSpec(rows, columns, canvas, bottom=0.5 / height, wspace=0.25, hspace=0.35, **margins)
        for cell, panel in zip(grid, shown, strict=False):
            parts = cell.subgridspec(2, 1, height_ratios=[3, 1], hspace=0.4)
            _histogram(canvas.add_subplot(parts[0]), panel)
            _outliers(canvas.add_subplot(parts[1]), panel)
        out = {}
        for kind, metadata in (("svg", {"Date": None, "Creator": None}), ("png", {"Software": None})):
            buffer = io.BytesIO()
            canvas.savefig(buffer, format=kind, metadata=metadata, transparent=kind == "svg", dpi=120)
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
    """Bins over all of a panel's scales but the outermost."""
    lowest = min(summary["s"]["lowest"] for _, summary in panel.sites)
    highest = max(summary["s"]["highest"] for _, summary in panel.sites)
    if highest <= lowest:
        return np.linspace(lowest - 0.5, lowest + 0.5, BINS + 1)
    fine = np.linspace(lowest, highest, 4096)
    counts = sum((rebinned(summary["s"], fine) for _, summary in panel.sites), np.zeros(len(fine) - 1))
    below = np.cumsum(counts) / counts.sum()
    first, last = np.searchsorted(below, [INSIDE, 1 - INSIDE])
    return np.linspace(fine[first], fine[last + 1], BINS + 1)


def _colours(count: int) -> list[str]:
    """From blue (the first layer) to red (the last)."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["turbo"](0.08 + 0.84 * i / max(count - 1, 1))) for i in range(count)]


def _scales(found: Found) -> bool:
    return bool(found.record.data["training"]["scales"])


def _layer(site: str) -> int:
    """The first number in a site's dotted name: its block."""
    found = re.search(r"\.(\d+)\.", site)
    return int(found.group(1)) if found else 0


def _movement(histogram: Mapping[str, Any]) -> float:
    """The mean of |log2| of a histogram of s / s0, from the middles of its bins."""
    edges = np.linspace(histogram["lowest"], histogram["highest"], len(histogram["counts"]) + 1)
    middles = np.maximum((edges[:-1] + edges[1:]) / 2, 1e-12)
    counts = np.asarray(histogram["counts"], dtype=np.float64)
    return float((np.abs(np.log2(middles)) * counts).sum() / counts.sum())
