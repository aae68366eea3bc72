"""The forest plot at the top of the page: paired differences to the baseline with their 95 % intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

MARGIN = 2  # per cent of the drawing's width on either side


def forest(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the perplexity differences of `cells` by table, positions in per cent; None without any.

    Equal numbers from the same records, in several tables, are drawn once.
    """
    found = {}
    for index, cell in enumerate(cells):
        if (interval := cell.get("interval")) and interval["unit"] == "%":
            found.setdefault((*cell["records"], str(cell["numbers"][0])), (index, cell))
    if not found:
        return None
    lowest = min(0.0, *(cell["interval"]["low"] for _, cell in found.values()))
    highest = max(0.0, *(cell["interval"]["high"] for _, cell in found.values()))
    scale = (100 - 2 * MARGIN) / ((highest - lowest) or 1)
    groups: dict[str, list[dict[str, Any]]] = {}
    for index, cell in found.values():
        interval = cell["interval"]
        said = f"{interval['mean']:+.1f} % [{interval['low']:+.1f}, {interval['high']:+.1f}]"
        row = {"index": index, "place": cell["place"], "link": cell["link"], "said": said.replace("-", "−")}
        row |= {end: round(MARGIN + scale * (interval[end] - lowest), 2) for end in ("low", "mean", "high")}
        row["significant"] = interval["significant"]
        groups.setdefault(cell["group"], []).append(row)
    zero = round(MARGIN - scale * lowest, 2)
    ends = [(MARGIN, f"{lowest:+.0f} %".replace("-", "−")), (zero, "0")] if lowest else [(zero, "0")]
    return {"groups": groups, "zero": zero, "ends": ends}
