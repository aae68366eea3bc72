"""The other verbs than run.py: `python -m teq report|publish|plan|prefetch|export|verify|cache ...`."""

import importlib
import logging
import re
import sys
from collections.abc import Sequence

from teq.console import print_errors
from teq.spec import UserError

USAGE = """\
usage: python -m teq <verb> ...

  report [experiment ...|all] [overrides]   tables and figures from records; takes run.py's overrides
  publish <experiment> ...                  copy the records an experiment shows to results/ and render them
  plan [--calibrate] [overrides]            memory and seconds that a run would take, without its weights
  prefetch [name ...|all]                   download evaluation sets into the mirror TEQ_DATA
  export <run id|overrides> --to <folder>   a quantized model as a folder that other code loads
  verify <folder>                           load an exported folder with that code, compare the numbers
  cache [prune --stage <what> --older 30d]  what the cache holds, and freeing space in it"""


def main(argv: Sequence[str]) -> int:
    """Run one verb. Returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    verb, *rest = argv or ["--help"]
    if verb in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    verbs = re.findall(r"^  (\w+) ", USAGE, re.MULTILINE)
    try:
        if verb not in verbs:
            raise UserError(f"there is no verb {verb!r}: it must be one of {', '.join(verbs)}")
        return importlib.import_module(f"teq.verbs.{verb}").main(rest)
    except UserError as error:
        print_errors(error)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
