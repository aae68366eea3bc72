"""The text that is always at hand: the topics of Python's own help."""

import functools
import hashlib
from typing import Any

NAME = "python-docs"
CALIBRATION_END = 55_000  # tokens before it calibrate,
EVALUATION_START = 60_000  # tokens from here on evaluate; the gap keeps the two apart


@functools.cache
def python_docs() -> str:
    """Return the topics of the library's `pydoc_data.topics`, by key; Python versions differ."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics))


def provenance() -> dict[str, Any]:
    """Name and digest of the text."""
    return {"name": NAME, "sha256": hashlib.sha256(python_docs().encode()).hexdigest()}
