"""Load exported folders with stock code, one for each line of standard input: a folder, a request, a file.

The answer is written to the file, which appears whole. The process knows nothing of this project but the
evaluation.
"""

import json
import sys
from pathlib import Path

from teq.evaluate import reloaded


def main() -> int:
    """Answer until standard input ends. Returns the exit status."""
    for line in sys.stdin:
        folder, request, file = json.loads(line)
        try:
            answer = reloaded.answer(Path(folder), request)
        except Exception as error:  # whatever a loader raises is the cell's result
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        aside = Path(f"{file}.part")
        aside.write_text(json.dumps(answer))
        aside.rename(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
