"""The forest plot at the top of the page: paired differences to the baseline with their 95 % intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

ROW, LABEL, WIDTH = 20, 420, 960  # pixels of the drawing


def forest(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the perplexity differences of `cells` in the coordinates of a drawing; None without any.

    Equal numbers from the same records, in several tables, are drawn once.
    """
    found = {}
    for cell in cells:
        if (interval := cell.get("interval")) and interval["unit"] == "%":
            found.setdefault((*cell["records"], str(cell["numbers"][0])), cell)
    if not found:
        return None
    lowest = min(0.0, *(cell["interval"]["low"] for cell in found.values()))
    highest = max(0.0, *(cell["interval"]["high"] for cell in found.values()))
    scale = (WIDTH - LABEL - 40) / ((highest - lowest) or 1)
    rows, group, y = [], "", 0
    for cell in found.values():
        interval = cell["interval"]
        y += ROW * (1 if cell["group"] == group else 2)  # a heading takes a line
        rows.append(
            {
                "heading": "" if cell["group"] == group else cell["group"],
                "place": cell["place"],
                "link": cell["link"],
                "y": y,
                "significant": interval["significant"],
                "said": f"{interval['mean']:+.1f} % [{interval['low']:+.1f}, {interval['high']:+.1f}]",
                **{
                    end: round(LABEL + scale * (interval[end] - lowest), 1) for end in ("low", "mean", "high")
                },
            }
        )
        group = cell["group"]
    zero = round(LABEL - scale * lowest, 1)
    ends = [(LABEL, f"{lowest:+.0f} %"), (zero, "0")]
    return {"rows": rows, "zero": zero, "ends": ends, "height": y + 2 * ROW, "width": WIDTH}
