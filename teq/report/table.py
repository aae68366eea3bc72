"""Tables: pure functions from records to numbers and verdicts, and the plain table that a run prints."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from teq import statistics
from teq.console import aligned
from teq.record import Record
from teq.report import compare, match
from teq.report.cells import (
    AS_STATED,
    BETTER,
    DIFFERS,
    MATCH,
    NOT_RUN,
    ONE_SEED,
    OURS,
    PARTIAL,
    UNJUDGED,
    WORSE,
    Cell,
    Place,
    Table,
)
from teq.report.layout import ANY, CELL, COSTS, FULL, UNMEASURED, WEIGHTS, Formula, Layout
from teq.report.match import RecordIndex
from teq.spec import UserError

if TYPE_CHECKING:
    from teq.config import Job
    from teq.grid import Grid


def fill(name: str, layout: Layout, jobs: Sequence["Job"], index: RecordIndex) -> Table:
    """Return the table of `layout` for the runs of `jobs`, from the records of `index`."""
    row_axes, column_axes = list(layout.rows), [*layout.columns, CELL]
    groups = _groups(name, [*layout.rows, *layout.columns], jobs)
    cells, fixed = layout.cells or {}, match.varying(job.run for job in jobs)
    filled: dict[tuple[Place, Place], Cell] = {}
    for place, alike in groups.items():
        for cell_name, formula in cells.items():
            at = dict(zip([*row_axes, *column_axes], (*place, cell_name), strict=True))
            row, column = tuple(at[a] for a in row_axes), tuple(at[a] for a in column_axes)
            filled[row, column] = _cell(name, layout, at, formula, alike, index, fixed)
    marked = compare.compare_with_baseline(compare.flag_mismatched_inputs(filled), layout)
    marked = compare.recover_gaps(compare.mark_best(marked, column_axes))
    rows = _in_order([row for row, _ in marked])
    columns = _in_order([column for _, column in marked])
    constant = {
        axis: columns[0][i]
        for i, axis in enumerate(column_axes)
        if axis != CELL and len({column[i] for column in columns}) == 1
    }
    return Table(name, layout, row_axes, column_axes, rows, columns, marked, constant)


def grid_name(grid: "Grid | None") -> str:
    """Return `w4`, `w4_g128`, `w3_g64_sym`; `full` for floating point."""
    if grid is None:
        return FULL
    group = "" if grid.group_size == -1 else f"_g{grid.group_size}"
    return f"w{grid.bits}{group}{'_sym' if grid.symmetric else ''}"


def _groups(name: str, axes: Sequence[str], jobs: Sequence["Job"]) -> dict[Place, list["Job"]]:
    """Return the jobs by their coordinates on `axes`; jobs of one cell differ only in their seed."""
    coordinates = {id(job): {axis: _coordinate(name, job, axis) for axis in axes} for job in jobs}
    same_run: dict[str, list[dict[str, str]]] = {}
    for job in jobs:
        same_run.setdefault(job.run.key(), []).append(coordinates[id(job)])
    groups: dict[Place, dict[str, Job]] = {}
    for job in jobs:
        alike = same_run[job.run.key()]
        place = tuple(
            value
            if axis in ("model", "method", "grid") or len({other[axis] for other in alike}) == 1
            else ANY
            for axis, value in coordinates[id(job)].items()
        )
        groups.setdefault(place, {}).setdefault(job.run.key(), job)
    for place, members in groups.items():
        varying = {
            override.partition("=")[0]
            for job in members.values()
            for override in set(job.overrides) ^ set(next(iter(members.values())).overrides)
        }
        if varying - {"seed"}:
            raise UserError(
                f"experiments/{name}.yaml: {len(members)} runs fall into one cell ({', '.join(place)}): "
                f"name {', '.join(sorted(varying))} in layout.rows or layout.columns"
            )
    return {place: list(members.values()) for place, members in groups.items()}


def _coordinate(name: str, job: "Job", axis: str) -> str:
    if axis == "model":
        return job.run.model.name
    if axis == "method":
        return job.run.method
    if axis == "grid":
        return grid_name(job.run.quantizer.grid)
    overrides = dict(override.partition("=")[::2] for override in job.overrides)
    if axis not in overrides:
        raise UserError(
            f"experiments/{name}.yaml: layout names the axis {axis!r}, which the sweep does not vary: it "
            f"must be model, method, grid or one of {', '.join(overrides)}"
        )
    return overrides[axis].strip("'\"")


def _cell(
    name: str,
    layout: Layout,
    at: dict[str, str],
    formula: Formula,
    jobs: list["Job"],
    index: RecordIndex,
    fixed: Mapping[Place, set[str]],
) -> Cell:
    published = layout.published.at(at, layout.rows) if layout.published else None
    if formula.setting is not None:
        ours = _setting(name, jobs[0], formula.setting)
        verdict = OURS if published is None else AS_STATED if ours == published else DIFFERS
        return Cell(at, formula, jobs, (), ours, None, None, published, verdict)
    for job in jobs:
        names = {evaluation.name for evaluation in job.run.evals}
        if unknown := formula.evaluations() - names:
            raise UserError(
                f"experiments/{name}.yaml: layout.cells.{at[CELL]} reads {sorted(unknown)[0]!r}, which no "
                "run of the experiment measures: it must be one of "
                f"{', '.join([*sorted(names), *UNMEASURED])}"
            )
    wanted = formula.evaluations()
    apart = [fixed[match.group_key(job.run.plain())] for job in jobs]
    answers = [
        index.find(job.run, wanted, not wanted, keys, formula.names)
        for job, keys in zip(jobs, apart, strict=True)
    ]
    found = list({f.record.file: f for f in answers if f is not None}.values())
    if not found:
        return Cell(at, formula, jobs, (), None, None, None, published, NOT_RUN)
    numbers = [formula.apply([metric(f.record, n, name, at[CELL]) for n in formula.names]) for f in found]
    ours = math.fsum(numbers) / len(numbers)
    spread = statistics.stderr_of_mean(numbers) * math.sqrt(len(numbers)) if len(numbers) > 1 else None
    stderr = compare.cell_stderr(formula, found[0].record)
    partial = any(f.differences for f in found) or len(found) < len({job.run.key() for job in jobs})
    verdict = PARTIAL if partial else _verdict(numbers, published, formula, _is_seeded(jobs[0]))
    return Cell(at, formula, jobs, found, ours, stderr, spread, published, verdict, numbers)


def _is_seeded(job: "Job") -> bool:
    """Return whether a run draws calibration text."""
    return any(stage.corpus() is not None for stage in job.run.calibrated)


def metric(record: Record, name: str, experiment: str, cell: str) -> float:
    """Return a record's number by `<evaluation>.<metric>` or `<cost>.<stage>`. Raises UserError."""
    part, _, key = name.rpartition(".")
    if part in COSTS:
        values = {stage: entry["cost"][part] for stage, entry in record.data["stages"].items()}
        made = [values[stage] or 0 for stage in ("scales", "weights", "tuned") if stage in values]
        values["quantizing"] = max(made) if part == "peak_bytes" else sum(made)
    elif part == WEIGHTS:
        values = record.weights
    else:
        values = record.metrics[part]["values"]
    if values.get(key) is None:
        raise UserError(
            f"experiments/{experiment}.yaml: layout.cells.{cell} reads {name!r}, which {record.file.name} "
            f"does not have: it must be one of {', '.join(f'{part}.{known}' for known in values)}"
        )
    return float(values[key])


def _verdict(numbers: Sequence[float], published: Any, formula: Formula, seeded: bool) -> str:
    """Return the verdict of our numbers, one per seed, against a published one; see `compare.tolerance`.

    A method that draws calibration text needs several seeds; no other machine has to meet seconds.
    """
    if published is None:
        return OURS
    if formula.is_cost:
        return UNJUDGED
    if seeded and len(numbers) < 2:
        return ONE_SEED
    ours = math.fsum(numbers) / len(numbers)
    if abs(ours - published) <= compare.tolerance(formula, published, numbers):
        return MATCH
    if formula.best is None:
        return DIFFERS
    return BETTER if (ours < published) == formula.lower_is_better else WORSE


def _setting(name: str, job: "Job", path: str) -> Any:
    node: Any = job.run.plain()
    for key in path.split("."):
        if not isinstance(node, Mapping) or key not in node:
            raise UserError(
                f"experiments/{name}.yaml: a cell reads the setting {path!r}, which {job.run.title()} does "
                "not have"
            )
        node = node[key]
    return node


def _in_order(places: Sequence[Place]) -> list[Place]:
    """Return distinct places, each axis in the order in which its values first appear."""
    orders = [{v: i for i, v in reversed(list(enumerate(axis)))} for axis in zip(*places, strict=True)]
    return sorted(dict.fromkeys(places), key=lambda place: [orders[i][v] for i, v in enumerate(place)])


def plain(records: Sequence[Record], methods: Mapping[str, str] | None = None) -> str:
    """Return model, method, grid, tuning if any, and every metric of some records, in Markdown.

    `methods` names the method of a record by its id as it was asked for now: one run may have several names.
    """
    metrics = list(
        dict.fromkeys(
            (evaluation, key)
            for r in records
            for evaluation, measured in r.metrics.items()
            for key in measured["values"]
            if not key.endswith("_stderr")  # they stand with what they belong to
        )
    )
    tuned = ["finetune"] if any("finetune" in r.data["run"] for r in records) else []
    rows = [["model", "method", "bits", "group", *tuned, *(f"{e} {m}" for e, m in metrics)]]
    for r in records:
        grid = r.data["run"]["quantizer"].get("grid") or {}
        cells = [r.data["run"]["model"]["name"], (methods or {}).get(r.id, r.data["run"]["method"])]
        cells += [str(grid.get(key, "")) for key in ("bits", "group_size")]
        cells += [r.data["run"].get("finetune", {}).get("parts", "none") for _ in tuned]
        for evaluation, key in metrics:
            value = r.metrics.get(evaluation, {}).get("values", {}).get(key)
            error = compare.stderr(r, f"{evaluation}.{key}") if value is not None and key != "ppl" else None
            cells.append(_short(value) if error is None else f"{_short(value)} ± {error:.2g}")
        rows.append(cells)
    return aligned(rows)


def _short(value: float | None) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return str(value)
    return f"{value:.4g}" if abs(value) < 1 else f"{value:.3f}"
