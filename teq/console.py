"""Progress of long work: a bar on a terminal, plain log lines where there is none."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any, TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 30.0


def print_errors(error: Exception | str) -> None:
    """Print each line of a message to standard error, marked as an error."""
    print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)


def track(items: Iterable[T], what: str) -> Iterator[T]:
    """Yield `items` while showing how many are done, the rate and the time left."""
    count = len(items) if isinstance(items, Sized) else None
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, desc=what, total=count, dynamic_ncols=True, leave=False)
        return
    start = spoken = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - spoken >= SECONDS_BETWEEN_LINES and done != count:
            spoken, rate = now, done / (now - start)
            left = f", {(count - done) / rate:.0f} s left" if count else ""
            log.info("%s: %d%s at %.2f/s%s", what, done, f" of {count}" if count else "", rate, left)


class File(logging.FileHandler):
    """A log file. On a full disk it warns once, and continues when there is space again."""

    def __init__(self, filename: str) -> None:
        super().__init__(filename, encoding="utf-8", delay=True)
        self.warned = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        try:
            super().emit(record)
        except OSError:  # the file could not be opened
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Drop what cannot be written."""
        if not isinstance(error := sys.exc_info()[1], OSError):
            super().handleError(record)
            return
        stream, self.stream = self.stream, None
        with contextlib.suppress(OSError, AttributeError):
            stream.close()  # which tries once more to write
        if not self.warned:
            self.warned = True
            log.warning("%s cannot be written (%s): the work goes on", self.baseFilename, error.strerror)


class Console(logging.StreamHandler):
    """A log handler that leaves a progress bar on the terminal whole, and follows a redirected stderr."""

    @property
    def stream(self) -> Any:
        """Return where standard error goes at this moment."""
        return sys.stderr

    @stream.setter
    def stream(self, _: Any) -> None:
        """Ignore the stream set by StreamHandler.__init__."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line above the bars."""
        try:
            from tqdm import tqdm

            with tqdm.external_write_mode(file=self.stream):
                super().emit(record)
        except Exception:
            self.handleError(record)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of `rows`, the first of them its header, padded to equal widths."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])
