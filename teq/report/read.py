"""Reading: experiments and records in, tables and figures out. Imports no torch and loads no model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from teq import config
from teq.config import Job
from teq.report import claims, figure, table
from teq.report.cells import Table
from teq.report.figure import Figure
from teq.report.layout import FULL, Layout
from teq.report.layout_checks import parse
from teq.report.match import RecordIndex
from teq.report.render import draw, formats, page, sheets
from teq.report.sheet import Sheet
from teq.spec import UserError

INDEX = "index.html"


@dataclass(frozen=True)
class Kind:
    """How a kind of layout is filled, printed and drawn."""

    fill: Callable[..., Table | Figure]
    sheet: Callable[..., Sheet]
    draw: Callable[..., dict[str, bytes]]
    panels: Callable[..., list[bytes]]


KINDS = {
    "table": Kind(table.fill, sheets.of_table, lambda _: {}, lambda _: []),
    "figure": Kind(figure.fill, sheets.of_figure, draw.draw, draw.panels),
}


@dataclass(frozen=True)
class Shown:
    """An experiment with its runs, its layout, and what the records fill into it."""

    name: str
    layout: Layout
    jobs: Sequence[Job]
    body: Table | Figure
    counted: Sequence[Table] = ()  # the other tables that its claims are counted in

    @property
    def unpublished(self) -> bool:
        """Return whether something in it comes from a record that is not published."""
        return any(match.unpublished for body in (self.body, *self.counted) for match in body.used())

    @cached_property
    def sheet(self) -> Sheet:
        """Return what is printed of it."""
        return KINDS[self.layout.kind].sheet(self.body)

    @cached_property
    def drawings(self) -> dict[str, bytes]:
        """Return a figure's `svg` and `png`; none of a table, or where nothing has run."""
        return KINDS[self.layout.kind].draw(self.body)

    @cached_property
    def panels(self) -> list[bytes]:
        """Return the SVGs of a figure's panels, one by one; none of a table."""
        return KINDS[self.layout.kind].panels(self.body)

    def markdown(self) -> str:
        """Return it as Markdown."""
        return formats.markdown(self.sheet)

    def write(self, folder: Path) -> list[Path]:
        """Render under `folder`; return the files, the Markdown first."""
        outputs = {
            f"tables/{self.name}.md": self.markdown().encode(),
            f"tables/{self.name}.tex": formats.latex(self.sheet).encode(),
            f"tables/{self.name}.csv": formats.comma_separated(self.sheet).encode(),
            **{f"figures/{self.name}.{kind}": content for kind, content in self.drawings.items()},
        }
        for name, content in outputs.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        return [folder / name for name in outputs]


def experiments() -> list[str]:
    """Return every experiment: the paper's tables and figures first."""
    order = ("table", "figure")
    return sorted(
        config.groups()["experiments"],
        key=lambda name: next((i for i, o in enumerate(order) if name.startswith(o)), len(order)),
    )


def read(name: str, overrides: Sequence[str], index: RecordIndex) -> Shown:
    """Return one experiment, its sweep narrowed by `overrides`, filled from the records of `index`."""
    return of(name, config.jobs([f"experiments={name}", *overrides]), index)


def of(name: str, jobs: Sequence[Job], index: RecordIndex) -> Shown:
    """Return some runs of an experiment, shown by its layout."""
    groups = config.groups()
    known = {axis: groups[axis] for axis in ("model", "method")} | {"grid": [FULL, *groups["grid"]]}
    layout = parse(name, jobs[0].layout, known)
    return Shown(name, layout, jobs, KINDS[layout.kind].fill(name, layout, jobs, index))


def read_all(
    names: Sequence[str], overrides: Sequence[str], index: RecordIndex
) -> tuple[dict[str, Shown], dict[str, str]]:
    """Return experiments by name with their claims counted, and the problem of each that cannot be shown.

    A problem of one experiment never hides the others.
    """
    shown: dict[str, Shown] = {}
    problems: dict[str, str] = {}

    def add(name: str) -> None:
        if name in shown or name in problems:
            return
        try:
            shown[name] = read(name, overrides, index)
        except UserError as error:
            problems[name] = str(error)
            return
        for claim in shown[name].layout.claims:
            for other in claim.tables or ():
                add(other)

    for name in names:
        add(name)
    filled = {name: one.body for name, one in shown.items() if one.layout.kind == "table"}
    for name in [name for name in names if name in filled]:
        needed = {t for claim in shown[name].layout.claims for t in claim.tables or (name,)}
        if lacking := needed - set(filled):
            problems[name] = (
                f"experiments/{name}.yaml: a claim needs {sorted(lacking)[0]}, which cannot be shown"
            )
            continue
        counts = claims.count_claims({name: filled[name], **{t: filled[t] for t in needed}})[name]
        counted = [filled[other] for other in sorted(needed)]
        shown[name] = replace(shown[name], body=replace(filled[name], claims=counts), counted=counted)
    return {name: shown[name] for name in names if name in shown}, problems


def write_page(shown: dict[str, Shown], problems: dict[str, str], file: Path) -> Path:
    """Write the page of some experiments; return its file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page_of(shown, problems), encoding="utf-8")
    return file


def page_of(shown: dict[str, Shown], problems: dict[str, str]) -> str:
    """Return the page of some experiments as HTML."""
    records = {match.record.file.stem: match.record for one in shown.values() for match in one.body.used()}
    drawn = [(one.sheet, one.panels) for one in shown.values()]
    return page.render(drawn, records.values(), problems)


def chosen(argv: Sequence[str]) -> tuple[list[str], list[str], bool]:
    """Return names of experiments, overrides, and whether all are meant: no name, or `all`."""
    overrides = [word for word in argv if "=" in word or word.startswith("~")]
    names = [word for word in argv if word not in overrides]
    known = experiments()
    for name in names:
        if name not in (*known, "all"):
            raise UserError(f"there is no experiment {name!r}: it must be all or some of {', '.join(known)}")
    whole = not names or "all" in names
    return known if whole else list(dict.fromkeys(names)), overrides, whole
