"""Perplexity against seconds of quantizing: a drawing per model and text, a point per method and grid."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from teq.record import Record
from teq.report.layout import FULL
from teq.report.table import metric

LEFT, RIGHT, TOP, BOTTOM = 46, 470, 16, 264  # the frame, in pixels of the drawing
FAR, LINE = 10, 13  # times the lowest perplexity; the height of a label


def tradeoffs(cells: Sequence[Mapping[str, Any]], records: Mapping[str, Record]) -> list[dict[str, Any]]:
    """Return the drawings of the perplexities among `cells`, in coordinates; those of one point are left out.

    The first cell of a method and grid counts, and a point far above the lowest one is left out.
    """
    found: dict[tuple[str, str], dict[tuple[str, str], Mapping[str, Any]]] = {}
    for cell in cells:
        if len(cell["metrics"]) == 1 and cell["metrics"][0].endswith(".ppl") and cell["records"]:
            group = found.setdefault((cell["model"], cell["metrics"][0].removesuffix(".ppl")), {})
            if cell["method"] and cell["grid"]:
                group.setdefault((cell["method"], cell["grid"]), cell)
    drawn = []
    for (model, text), group in found.items():
        points = []
        for (method, grid), cell in group.items():
            one = records[cell["records"][0]]
            seconds = metric(one, "seconds.quantizing", "", "")
            if grid != FULL and seconds > 0:
                points.append((seconds, cell["value"], f"{method} {grid}", cell["link"]))
        lowest = min((point[1] for point in points), default=math.inf)
        points = [point for point in points if point[1] < FAR * lowest]
        if len(points) > 1:
            full = next((cell["value"] for (_, grid), cell in group.items() if grid == FULL), None)
            drawn.append({"title": f"{model}, {text}", **_drawing(points, full)})
    return drawn


def _drawing(points: Sequence[tuple[float, float, str, str]], full: float | None) -> dict[str, Any]:
    """Return points, labels and ticks on two logarithmic axes."""
    seconds, values = [point[0] for point in points], [point[1] for point in points]
    x = _axis(seconds, LEFT + 20, RIGHT - 20)
    y = _axis([*values, *([] if full is None else [full])], BOTTOM - 14, TOP + 14)
    placed, label = [], -math.inf
    for own, value, name, link in sorted(points, key=lambda point: -point[1]):
        label = max(y(value) + 4, label + LINE)
        said = f"{name}: {value:,.2f} after {own:,.1f} s"
        right = x(own) > (LEFT + RIGHT) / 2
        at = {"x": x(own), "y": y(value), "label": round(label, 1), "right": right}
        placed.append({**at, "name": name, "link": link, "said": said})
    return {
        "points": placed,
        "full": None if full is None else y(full),
        "across": [(x(tick), f"{tick:g} s") for tick in _ticks(seconds, (1,))],
        "up": [(y(tick), f"{tick:,g}") for tick in _ticks(values, (1, 2, 5))],
    }


def _axis(values: Sequence[float], start: float, end: float) -> Any:
    """Return the map from a value to its place on a logarithmic axis over `values`."""
    lowest, highest = math.log(min(values)), math.log(max(values))
    width = (highest - lowest) or 1
    return lambda value: round(start + (end - start) * (math.log(value) - lowest) / width, 1)


def _ticks(values: Sequence[float], steps: Sequence[int]) -> list[float]:
    """Return the round numbers within the range of `values`."""
    decades = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
    found = [step * 10.0**decade for decade in decades for step in steps]
    return [tick for tick in found if min(values) <= tick <= max(values)]
