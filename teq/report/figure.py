"""Figures: the scales of runs by layer, from the histograms that records keep."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from teq.report.layout import Layout
from teq.report.match import Match, RecordIndex
from teq.report.table import grid_name
from teq.spec import UserError

if TYPE_CHECKING:
    from teq.config import Job


@dataclass(frozen=True)
class Layer:
    """One layer's scales: how many, the share near their start, and the mean of |log2(s / s0)|."""

    index: int
    channels: int
    near: float
    movement: float


@dataclass(frozen=True)
class Panel:
    """One run's scales; `match` is None where it has not run."""

    model: str
    grid: str
    jobs: Sequence["Job"]
    match: Match | None

    @cached_property
    def sites(self) -> list[tuple[int, Mapping[str, Any]]]:
        """Return layer index and summary of each site, first to last."""
        scales = self.match.record.data["training"]["scales"] if self.match else {}
        layered = [(_layer(site), summary) for site, summary in scales.items()]
        return sorted(layered, key=lambda entry: entry[0])

    @cached_property
    def layers(self) -> list[Layer]:
        """Return the layers, first to last."""
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
        """Return the share of all scales near their start."""
        return math.fsum(layer.near * layer.channels for layer in self.layers) / sum(
            layer.channels for layer in self.layers
        )

    @property
    def thirds(self) -> tuple[float, float, float]:
        """Return the mean movement of the first, middle and last third of the layers."""
        parts = np.array_split(np.array([layer.movement for layer in self.layers]), 3)
        first, middle, last = (float(part.mean()) if len(part) else math.nan for part in parts)
        return first, middle, last

    @property
    def outlying(self) -> list[Layer]:
        """Return the layers with the most scales far from their start, at most three."""
        ranked = sorted(self.layers, key=lambda layer: (layer.near, layer.index))
        return [layer for layer in ranked[:3] if layer.near < 1]


@dataclass(frozen=True)
class Figure:
    """The panels of an experiment."""

    name: str
    layout: Layout
    panels: Sequence[Panel]

    def used(self) -> list[Match]:
        """Return every record that some panel shows."""
        return [panel.match for panel in self.panels if panel.match is not None]


def fill(name: str, layout: Layout, jobs: Sequence["Job"], index: RecordIndex) -> Figure:
    """Return the panels of `layout` for the runs of `jobs`; a model in `layout.panels` has its grid alone."""
    chosen = layout.panels or {}
    panels: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        model, grid = job.run.model.name, grid_name(job.run.quantizer.grid)
        if chosen.get(model, grid) == grid:
            panels.setdefault((model, grid), []).append(job)
    if not panels:
        wanted = ", ".join(f"{model} at {grid}" for model, grid in chosen.items())
        raise UserError(f"experiments/{name}.yaml: no run of the sweep is one of its panels: {wanted}")
    filled = []
    for (model, grid), alike in panels.items():
        match = index.find(alike[0].run, set(), fixed=("transform.init",))
        has_scales = match is not None and match.record.data["training"]["scales"]
        filled.append(Panel(model, grid, alike, match if has_scales else None))
    return Figure(name, layout, filled)


def _layer(site: str) -> int:
    """Return the first number in a site's dotted name: its block."""
    found = re.search(r"\.(\d+)\.", site)
    return int(found.group(1)) if found else 0


def _movement(histogram: Mapping[str, Any]) -> float:
    """Return the mean of |log2| of a histogram of s / s0, from the middles of its bins."""
    edges = np.linspace(histogram["lowest"], histogram["highest"], len(histogram["counts"]) + 1)
    middles = np.maximum((edges[:-1] + edges[1:]) / 2, 1e-12)
    counts = np.asarray(histogram["counts"], dtype=np.float64)
    return float((np.abs(np.log2(middles)) * counts).sum() / counts.sum())
