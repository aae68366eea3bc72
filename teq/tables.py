"""Tables: pure functions from records to text."""

from collections.abc import Sequence

from teq.record import Record


def plain(records: Sequence[Record]) -> str:
    """Model, method, grid and every metric of some records, in Markdown."""
    metrics = list(dict.fromkeys((e, m) for r in records for e in r.metrics for m in r.metrics[e]["values"]))
    rows = [["model", "method", "bits", "group", *(f"{e} {m}" for e, m in metrics)]]
    for r in records:
        grid = r.data["run"]["quantizer"].get("grid") or {}
        cells = [r.data["run"]["model"]["name"], r.data["run"]["method"]]
        cells += [str(grid.get(key, "")) for key in ("bits", "group_size")]
        for evaluation, metric in metrics:
            value = r.metrics.get(evaluation, {}).get("values", {}).get(metric)
            cells.append("" if value is None else f"{value:.4g}" if abs(value) < 1 else f"{value:.3f}")
        rows.append(cells)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])
