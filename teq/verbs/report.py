"""`python -m teq report [experiment ...|all] [overrides]`: render tables and figures from records."""

from collections.abc import Sequence

from teq import config
from teq.console import print_errors
from teq.report.match import RecordIndex
from teq.report.read import INDEX, chosen, read_all, write_page


def main(argv: Sequence[str]) -> int:
    """Render and print; return the exit status.

    What published records alone fill is rendered into results/, anything else into the user's own folder.
    """
    names, overrides, whole = chosen(argv)
    results, own = config.folder("results"), config.home() / "report"
    shown, problems = read_all(names, overrides, RecordIndex(results / "records", config.home() / "records"))
    for one in shown.values():
        files = one.write(own if one.unpublished or overrides else results)
        why = "narrowed" if overrides else "published records alone"
        why = "with records of your own" if one.unpublished else why
        print(f"{one.markdown()}\n{one.name}: {files[0]} ({why})")
        if not whole:
            print(f"page: {write_page({one.name: one}, {}, own / f'{one.name}.html')}")
        print()
    if whole:
        mixed = overrides or any(one.unpublished for one in shown.values())
        print(f"report: {write_page(shown, problems, (own if mixed else results / 'report') / INDEX)}")
    for problem in problems.values():
        print_errors(problem)
    return 2 if problems else 0
