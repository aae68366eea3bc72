"""The verbs beside run.py: `python -m teq report|publish|plan|prefetch|cache ...`."""

import logging
import sys
from collections.abc import Sequence

from teq.spec import UserError

USAGE = """\
usage: python -m teq <verb> ...

  report [experiment ...|all] [overrides]   tables and figures from records; takes run.py's overrides
  publish <experiment> ...                  copy the records an experiment shows to results/ and render them
  plan [--calibrate] [overrides]            memory and seconds that a run would take, without its weights
  prefetch [name ...|all]                   download evaluation sets into the mirror TEQ_DATA
  cache [prune --stage <what> --older 30d]  what the cache holds, and freeing space in it"""


def main(argv: Sequence[str]) -> int:
    """Run one verb. Returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    verb, *rest = argv or ["--help"]
    if verb in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    try:
        if verb in ("report", "publish"):
            from teq.report import read as report

            return report.report(rest) if verb == "report" else report.publish(rest)
        if verb == "plan":
            from teq.verbs import plan

            return plan.main(rest)
        if verb == "prefetch":
            from teq.verbs import prefetch

            return prefetch.main(rest)
        if verb == "cache":
            from teq.verbs import cache

            return cache.main(rest)
    except UserError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    known = "report, publish, plan, prefetch, cache"
    print(f"error: there is no verb {verb!r}: it must be one of {known}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
