"""`python -m teq publish <experiment> ...`: copy the records that its cells use to results/ and render."""

import shutil
from collections.abc import Sequence

from teq import config
from teq.console import print_errors
from teq.report.match import RecordIndex
from teq.report.read import INDEX, chosen, experiments, read_all, write_page
from teq.spec import UserError


def main(argv: Sequence[str]) -> int:
    """Publish; all of results/ is rendered again, because other experiments may show these records too."""
    names, overrides, _ = chosen(argv)
    if not argv:
        raise UserError(f"publish needs an experiment: all or some of {', '.join(names)}")
    if overrides:
        raise UserError(
            f"publish takes no overrides, {overrides[0]} is one: an experiment is published as it stands"
        )
    results = config.folder("results")
    shown, problems = read_all(names, (), RecordIndex(results / "records", config.home() / "records"))
    (results / "records").mkdir(parents=True, exist_ok=True)
    for one in shown.values():
        new = [match.record.file for match in one.body.used() if match.unpublished]
        for file in new:
            shutil.copyfile(file, results / "records" / file.name)
        print(f"{one.name}: {len(new)} records copied to {results / 'records'}")
    published, elsewhere = read_all(experiments(), (), RecordIndex(results / "records"))
    for name, one in published.items():
        files = one.write(results)
        if name in shown:
            print(f"{name}: {files[0]}")
    print(f"report: {write_page(published, elsewhere, results / 'report' / INDEX)}")
    for problem in problems.values():
        print_errors(problem)
    return 2 if problems else 0
