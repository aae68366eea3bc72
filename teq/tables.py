"""Tables: pure functions from records to numbers and verdicts, and the plain table that a run prints."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from teq import lookup, statistics
from teq.layout import ANY, CELL, COSTS, FULL, Cell, Layout
from teq.lookup import Found, Library
from teq.record import Record
from teq.spec import UserError
from teq.uncertainty import against, cell_stderr, stderr

if TYPE_CHECKING:
    from teq.config import Job
    from teq.grid import Grid

BASELINE = "rtn"  # what differences are tested against
MATCH, BETTER, WORSE, DIFFERS, PARTIAL, NOT_RUN, OURS = (
    "match",
    "better",
    "worse",
    "differs",
    "partial",
    "not run",
    "ours only",
)
Place = tuple[str, ...]


@dataclass(frozen=True)
class Value:
    """What one cell shows. `at` holds its coordinates by axis; several `found` are several seeds."""

    at: Mapping[str, str]
    formula: Cell
    jobs: Sequence["Job"]
    found: Sequence[Found]
    ours: float | str | None
    stderr: float | None
    spread: float | None
    published: float | str | None
    verdict: str
    beside: Sequence[tuple[float, float]] = ()  # each record minus the baseline's: ends of the 95 % interval
    best: bool = False

    @property
    def differences(self) -> dict[str, tuple[Any, Any]]:
        """The settings in which the records differ from the run that the cell stands for."""
        return {key: pair for found in self.found for key, pair in found.differences.items()}

    @property
    def noise(self) -> bool:
        """Whether no record of the cell can be told from the baseline on the same documents or windows."""
        return bool(self.beside) and all(low <= 0 <= high for low, high in self.beside)

    @property
    def synthetic(self) -> bool:
        """Whether the number comes from made-up weights."""
        return any(found.record.synthetic for found in self.found)

    @property
    def difference(self) -> float | None:
        """Ours minus the published number."""
        if isinstance(self.ours, float) and isinstance(self.published, int | float):
            return self.ours - self.published
        return None


@dataclass(frozen=True)
class Checked:
    """A claim of the paper, counted again."""

    says: str
    claimed: tuple[int, int]  # how many, of how many
    published: tuple[int, int]  # recomputed from the published numbers
    ours: tuple[int, int]  # from the scenarios that our records cover
    partial: bool  # whether some of those are partial


@dataclass(frozen=True)
class Table:
    """A filled table. Rows and columns are tuples of coordinates; a column's last one is the cell's name."""

    name: str
    layout: Layout
    row_axes: Sequence[str]
    column_axes: Sequence[str]
    rows: Sequence[Place]
    columns: Sequence[Place]
    values: Mapping[tuple[Place, Place], Value]
    constant: Mapping[str, str]  # column axes that have one value here
    claims: Sequence[Checked] = field(default=())

    def used(self) -> list[Found]:
        """Every record that some cell shows, once each."""
        found = {f.record.file: f for value in self.values.values() for f in value.found}
        return list(found.values())


def fill(name: str, layout: Layout, jobs: Sequence["Job"], library: Library) -> Table:
    """The table of `layout` for the runs of `jobs`, from the records in `library`."""
    row_axes, column_axes = list(layout.rows), [*layout.columns, CELL]
    groups = _groups(name, [*layout.rows, *layout.columns], jobs)
    cells, fixed = layout.cells or {}, lookup.varying(job.run for job in jobs)
    values: dict[tuple[Place, Place], Value] = {}
    for place, alike in groups.items():
        for cell_name, formula in cells.items():
            at = dict(zip([*row_axes, *column_axes], (*place, cell_name), strict=True))
            row, column = tuple(at[a] for a in row_axes), tuple(at[a] for a in column_axes)
            values[row, column] = _value(name, layout, at, formula, alike, library, fixed)
    values = _with_best(_beside_baseline(_strangers_marked(values)), column_axes)
    rows = _in_order([row for row, _ in values])
    columns = _in_order([column for _, column in values])
    constant = {
        axis: columns[0][i]
        for i, axis in enumerate(column_axes)
        if axis != CELL and len({column[i] for column in columns}) == 1
    }
    return Table(name, layout, row_axes, column_axes, rows, columns, values, constant)


def grid_name(grid: "Grid | None") -> str:
    """`w4`, `w4_g128`, `w3_g64_sym`; `full` for floating point."""
    if grid is None:
        return FULL
    group = "" if grid.group_size == -1 else f"_g{grid.group_size}"
    return f"w{grid.bits}{group}{'_sym' if grid.symmetric else ''}"


def _groups(name: str, axes: Sequence[str], jobs: Sequence["Job"]) -> dict[Place, list["Job"]]:
    """The jobs by their coordinates on `axes`; jobs in one place differ in their seed alone."""
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
            "must be "
            f"model, method, grid or one of {', '.join(overrides)}"
        )
    return overrides[axis].strip("'\"")


def _value(
    name: str,
    layout: Layout,
    at: dict[str, str],
    formula: Cell,
    jobs: list["Job"],
    library: Library,
    fixed: Mapping[Place, set[str]],
) -> Value:
    published = layout.published.at(at, layout.rows) if layout.published else None
    if formula.setting is not None:
        ours = _setting(name, jobs[0], formula.setting)
        verdict = OURS if published is None else MATCH if ours == published else DIFFERS
        return Value(at, formula, jobs, (), ours, None, None, published, verdict)
    for job in jobs:
        names = {evaluation.name for evaluation in job.run.evals}
        if unknown := formula.evaluations() - names:
            raise UserError(
                f"experiments/{name}.yaml: layout.cells.{at[CELL]} reads {sorted(unknown)[0]!r}, which no "
                "run of the "
                f"experiment measures: it must be one of {', '.join([*sorted(names), *COSTS])}"
            )
    wanted = formula.evaluations()
    apart = [fixed[lookup.place(job.run.plain())] for job in jobs]
    answers = [library.find(job.run, wanted, not wanted, keys) for job, keys in zip(jobs, apart, strict=True)]
    found = list({f.record.file: f for f in answers if f is not None}.values())
    if not found:
        return Value(at, formula, jobs, (), None, None, None, published, NOT_RUN)
    numbers = [formula.apply([metric(f.record, n, name, at[CELL]) for n in formula.names]) for f in found]
    ours = math.fsum(numbers) / len(numbers)
    spread = statistics.stderr_of_mean(numbers) * math.sqrt(len(numbers)) if len(numbers) > 1 else None
    stderr = cell_stderr(formula, found[0].record)
    partial = any(f.differences for f in found) or len(found) < len({job.run.key() for job in jobs})
    verdict = PARTIAL if partial else _verdict(ours, published, stderr, spread, formula)
    return Value(at, formula, jobs, found, ours, stderr, spread, published, verdict)


def metric(record: Record, name: str, experiment: str, cell: str) -> float:
    """A record's number by `<evaluation>.<metric>` or `<cost>.<stage>`. Raises UserError without one."""
    part, _, key = name.rpartition(".")
    if part in COSTS:
        values = {stage: entry["cost"][part] for stage, entry in record.data["stages"].items()}
    else:
        values = record.metrics[part]["values"]
    if values.get(key) is None:
        raise UserError(
            f"experiments/{experiment}.yaml: layout.cells.{cell} reads {name!r}, which {record.file.name} "
            "does not "
            f"have: it must be one of {', '.join(f'{part}.{known}' for known in values)}"
        )
    return float(values[key])


def _verdict(ours: float, published: Any, error: float | None, spread: float | None, formula: Cell) -> str:
    """Within the noise band (95 % of standard error and spread over seeds, and the printed digits): match."""
    if published is None:
        return OURS
    band = statistics.Z * math.hypot(error or 0, spread or 0) + 0.5000001 * 10**-formula.digits
    if abs(ours - published) <= band:
        return MATCH
    if formula.best is None:
        return DIFFERS
    return BETTER if (ours < published) == (formula.best == "lowest") else WORSE


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


def _strangers_marked(values: dict[tuple[Place, Place], Value]) -> dict[tuple[Place, Place], Value]:
    """Make partial the cells whose records read other weights or another text than most records here did,
    under the same name: another commit of a revision, the embedded text of another Python.
    """
    records = {f.record.file: f.record for value in values.values() for f in value.found}.values()
    counts: dict[str, Counter[str]] = {}
    for record in records:
        for name, digest in _read(record):
            counts.setdefault(name, Counter())[digest] += 1
    usual = {name: counter.most_common(1)[0][0] for name, counter in counts.items()}
    out = {}
    for place, value in values.items():
        mine = {f"{value.at.get('model')}.weights"} | {f"{name}.text" for name in value.formula.evaluations()}
        found = []
        for one in value.found:
            strange = {
                n: (usual[n][:16], d[:16]) for n, d in _read(one.record) if n in mine and d != usual[n]
            }
            found.append(dataclasses.replace(one, differences={**one.differences, **strange}))
        verdict = PARTIAL if any(one.differences for one in found) else value.verdict
        out[place] = dataclasses.replace(value, found=found, verdict=verdict)
    return out


def _read(record: Record) -> Iterator[tuple[str, str]]:
    """What a record's numbers were measured on, as (name, digest)."""
    if not record.synthetic:
        yield f"{record.data['run']['model']['name']}.weights", record.data["identity"]
    for name, measured in record.metrics.items():
        if "sha256" in measured["info"]:
            yield f"{name}.text", measured["info"]["sha256"]


def _beside_baseline(values: dict[tuple[Place, Place], Value]) -> dict[tuple[Place, Place], Value]:
    """Compare each cell with its baseline on the same documents or windows."""
    baselines = [value for value in values.values() if value.at.get("method") == BASELINE]
    out = {}
    for place, value in values.items():
        beside = [one for one in baselines if one is not value and _same_but_method(value, one)]
        if beside and beside[0].found and value.found:
            baseline = beside[0].found[0].record
            intervals = [against(value.formula, one.record, baseline) for one in value.found]
            if None not in intervals:
                value = dataclasses.replace(value, beside=intervals)
        out[place] = value
    return out


def _same_but_method(value: Value, baseline: Value) -> bool:
    return all(axis == "method" or wanted in (value.at[axis], ANY) for axis, wanted in baseline.at.items())


def _with_best(
    values: dict[tuple[Place, Place], Value], column_axes: Sequence[str]
) -> dict[tuple[Place, Place], Value]:
    """Mark the best of our numbers in a column among the rows of one grid and one model."""
    blocks: dict[tuple[Any, ...], list[tuple[Place, Place]]] = {}
    for place, value in values.items():
        if isinstance(value.ours, float) and value.formula.best and value.at.get("grid") != FULL:
            block = place[1], value.at.get("grid"), value.at.get("model")
            blocks.setdefault(block, []).append(place)
    out = dict(values)
    for places in blocks.values():
        numbers = [values[place].ours for place in places if isinstance(values[place].ours, float)]
        top = min(numbers) if values[places[0]].formula.best == "lowest" else max(numbers)
        for place in places if len(places) > 1 else []:
            if values[place].ours == top:
                out[place] = dataclasses.replace(values[place], best=True)
    return out


def _in_order(places: Sequence[Place]) -> list[Place]:
    """Distinct places sorted axis by axis in the order in which each axis' values first appear."""
    orders = [{v: i for i, v in reversed(list(enumerate(axis)))} for axis in zip(*places, strict=True)]
    return sorted(dict.fromkeys(places), key=lambda place: [orders[i][v] for i, v in enumerate(place)])


def plain(records: Sequence[Record]) -> str:
    """Model, method, grid and every metric of some records, in Markdown."""
    metrics = list(
        dict.fromkeys(
            (evaluation, key)
            for r in records
            for evaluation, measured in r.metrics.items()
            for key in measured["values"]
            if not key.endswith("_stderr")  # they stand beside what they belong to
        )
    )
    rows = [["model", "method", "bits", "group", *(f"{e} {m}" for e, m in metrics)]]
    for r in records:
        grid = r.data["run"]["quantizer"].get("grid") or {}
        cells = [r.data["run"]["model"]["name"], r.data["run"]["method"]]
        cells += [str(grid.get(key, "")) for key in ("bits", "group_size")]
        for evaluation, key in metrics:
            value = r.metrics.get(evaluation, {}).get("values", {}).get(key)
            error = stderr(r, f"{evaluation}.{key}") if value is not None and key != "ppl" else None
            cells.append(_short(value) if error is None else f"{_short(value)} ± {error:.2g}")
        rows.append(cells)
    return aligned(rows)


def _short(value: float | None) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return str(value)
    return f"{value:.4g}" if abs(value) < 1 else f"{value:.3f}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of `rows`, the first of them its header, padded to equal widths."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])
