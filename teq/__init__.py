"""Trainable equivalent transformations for weight quantization: `teq.load(run)` gives a quantized model."""

from typing import Any

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """Import `load` when it is asked for: the other modules of the package do not need all of it."""
    if name == "load":
        from teq.verbs.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
