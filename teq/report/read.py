"""Reading: experiments and records in, tables and figures out. Imports no torch and loads no model."""

import csv
import io
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from teq import config
from teq.config import Job
from teq.report import claims, figure
from teq.report import table as tables
from teq.report.cells import Table
from teq.report.figure import Figure
from teq.report.layout import FULL, Layout, parse
from teq.report.match import Library
from teq.report.render import figure_text, page, text
from teq.spec import UserError

INDEX = "index.html"


@dataclass(frozen=True)
class Shown:
    """An experiment with its runs, its layout, and what the records fill into it."""

    name: str
    layout: Layout
    jobs: Sequence[Job]
    body: Table | Figure
    counted: Sequence[Table] = ()  # the other tables that its claims are counted in

    @property
    def own(self) -> bool:
        """Whether something in it comes from a record that is not published."""
        return any(found.own for body in (self.body, *self.counted) for found in body.used())

    def markdown(self) -> str:
        """As Markdown."""
        module = text if isinstance(self.body, Table) else figure_text
        return module.markdown(self.body)

    @cached_property
    def drawings(self) -> dict[str, bytes]:
        """A figure's `svg` and `png`; none of a table, or where nothing has run."""
        return {} if isinstance(self.body, Table) else figure.draw(self.body)

    def rows(self) -> list[list[str]]:
        """A header and a row for each cell, or for each layer of a figure's panels."""
        module = text if isinstance(self.body, Table) else figure_text
        return list(csv.reader(io.StringIO(module.comma_separated(self.body))))

    def write(self, folder: Path) -> list[Path]:
        """Render under `folder`; returns the files, the Markdown first."""
        module = text if isinstance(self.body, Table) else figure_text
        outputs = {
            f"tables/{self.name}.md": self.markdown().encode(),
            f"tables/{self.name}.tex": module.latex(self.body).encode(),
            f"tables/{self.name}.csv": module.comma_separated(self.body).encode(),
            **{f"figures/{self.name}.{kind}": content for kind, content in self.drawings.items()},
        }
        for name, content in outputs.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        return [folder / name for name in outputs]


def experiments() -> list[str]:
    """Every experiment: the paper's tables and figures first."""
    order = ("table", "figure")
    names = config.groups()["experiments"]
    return sorted(
        names, key=lambda name: next((i for i, o in enumerate(order) if name.startswith(o)), len(order))
    )


def read(name: str, overrides: Sequence[str], library: Library) -> Shown:
    """One experiment, its sweep narrowed by `overrides`, filled from the records of `library`."""
    return of(name, config.jobs([f"experiments={name}", *overrides]), library)


def of(name: str, jobs: Sequence[Job], library: Library) -> Shown:
    """Some runs of an experiment, shown by its layout."""
    groups = config.groups()
    known = {axis: groups[axis] for axis in ("model", "method")} | {"grid": [FULL, *groups["grid"]]}
    layout = parse(name, jobs[0].layout, known)
    fill = tables.fill if layout.kind == "table" else figure.fill
    return Shown(name, layout, jobs, fill(name, layout, jobs, library))


def read_all(
    names: Sequence[str], overrides: Sequence[str], library: Library
) -> tuple[dict[str, Shown], dict[str, str]]:
    """The experiments of `names` by name with their claims counted, and the problem of each that cannot be
    shown.

    A problem of one experiment never hides the others.
    """
    shown: dict[str, Shown] = {}
    problems: dict[str, str] = {}

    def add(name: str) -> None:
        if name in shown or name in problems:
            return
        try:
            shown[name] = read(name, overrides, library)
        except UserError as error:
            problems[name] = str(error)
            return
        for claim in shown[name].layout.claims:
            for other in claim.tables or ():
                add(other)

    for name in names:
        add(name)
    filled = {name: one.body for name, one in shown.items() if isinstance(one.body, Table)}
    for name in names:
        if name not in filled:
            continue
        needed = {t for claim in shown[name].layout.claims for t in claim.tables or (name,)}
        if lacking := needed - set(filled):
            problems[name] = (
                f"experiments/{name}.yaml: a claim needs {sorted(lacking)[0]}, which cannot be shown"
            )
            continue
        checked = claims.check_claims({name: filled[name], **{t: filled[t] for t in needed}})[name]
        counted = [filled[table] for table in sorted(needed)]
        shown[name] = replace(shown[name], body=replace(filled[name], claims=checked), counted=counted)
    return {name: shown[name] for name in names if name in shown}, problems


def report(argv: Sequence[str]) -> int:
    """`report [experiment ...|all] [overrides]`: render and print; returns the exit status."""
    names, overrides, whole = _split(argv)
    results = config.folder("results")
    library = Library(results / "records", config.home() / "records")
    shown, problems = read_all(names, overrides, library)
    own = config.home() / "report"
    for one in shown.values():
        files = one.write(own if one.own or overrides else results)
        why = (
            "with records of your own" if one.own else "narrowed" if overrides else "published records alone"
        )
        print(f"{one.markdown()}\n{one.name}: {files[0]} ({why})")
        if not whole:
            print(f"page: {_write_page({one.name: one}, {}, own / f'{one.name}.html')}")
        print()
    if whole:
        mixed = overrides or any(one.own for one in shown.values())
        print(f"report: {_write_page(shown, problems, (own if mixed else results / 'report') / INDEX)}")
    return _said(problems)


def publish(argv: Sequence[str]) -> int:
    """`publish <experiment> ...`: copy the records that its cells use to results/records, and render all of
    results/, for other experiments may show these records too.
    """
    names, overrides, _ = _split(argv)
    results = config.folder("results")
    if not argv:
        raise UserError(f"publish needs an experiment: all or some of {', '.join(names)}")
    if overrides:
        raise UserError(
            f"publish takes no overrides, {overrides[0]} is one: an experiment is published as it stands"
        )
    shown, problems = read_all(names, (), Library(results / "records", config.home() / "records"))
    (results / "records").mkdir(parents=True, exist_ok=True)
    for one in shown.values():
        new = [found.record.file for found in one.body.used() if found.own]
        for file in new:
            shutil.copyfile(file, results / "records" / file.name)
        print(f"{one.name}: {len(new)} records copied to {results / 'records'}")
    published, elsewhere = read_all(experiments(), (), Library(results / "records"))
    for name, one in published.items():
        files = one.write(results)
        if name in shown:
            print(f"{name}: {files[0]}")
    print(f"report: {_write_page(published, elsewhere, results / 'report' / INDEX)}")
    return _said(problems)


def _write_page(shown: dict[str, Shown], problems: dict[str, str], file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page.render(shown, problems), encoding="utf-8")
    return file


def _split(argv: Sequence[str]) -> tuple[list[str], list[str], bool]:
    """Names of experiments, overrides, and whether all are meant: no name, or `all`."""
    overrides = [word for word in argv if "=" in word or word.startswith("~")]
    names = [word for word in argv if word not in overrides]
    known = experiments()
    for name in names:
        if name not in (*known, "all"):
            raise UserError(f"there is no experiment {name!r}: it must be all or some of {', '.join(known)}")
    whole = not names or "all" in names
    return known if whole else list(dict.fromkeys(names)), overrides, whole


def _said(problems: dict[str, str]) -> int:
    for problem in problems.values():
        print("\n".join(f"error: {line}" for line in problem.splitlines()), file=sys.stderr)
    return 2 if problems else 0
