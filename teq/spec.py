"""Settings: frozen, type-checked descriptions of work, and the content hash that names its result."""

import dataclasses
import difflib
import hashlib
import json
import math
import operator
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar


class UserError(Exception):
    """Bad input. The message is one line: what, the value, what is allowed, the way out."""


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Return the end of a message on an unknown word: the closest known one, then all of them."""
    known = list(known)
    close = difflib.get_close_matches(str(word), known, 1)
    return (f"did you mean {close[0]}? " if close else "") + f"it must be one of {', '.join(known)}"


def option(
    default: Any = dataclasses.MISSING,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    among: tuple[Any, ...] | None = None,
    key: str | None = None,
    hashed: bool = True,
    omitted: Any = dataclasses.MISSING,
    recorded: Mapping[Any, dict[str, Any]] | None = None,
) -> Any:
    """Declare a dataclass field whose value must lie in a range or in a set; `Settings` checks it.

    `key` is the name the command line knows it by, where that is not `<group>.<field>`. A field that is not
    `hashed` (a display name, the words of a message) is neither in the key nor in a record. A field that has
    the value `omitted` is left out of both, so that an option added later changes no key of a run without it.
    `recorded` gives for each value the fields that stand for it in both, where it replaced some of them.
    """
    bounds = {"above": above, "at_least": at_least, "at_most": at_most, "among": among, "key": key}
    metadata = {k: v for k, v in bounds.items() if v is not None} | {"hashed": hashed}
    if recorded is not None:
        metadata["recorded"] = recorded
    if omitted is not dataclasses.MISSING:
        metadata["omitted"] = omitted
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Exactly the fields that one stage reads. Two equal settings are one piece of work: `key()` is its name.

    `version` is bumped when the same fields come to mean another result. `group` is the prefix under which
    the command line knows the fields, so that a message can name what the user typed.
    """

    version: ClassVar[int] = 1
    group: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind = typing.get_type_hints(type(self))[field.name]
            name = field.metadata.get("key") or ".".join(filter(None, [self.group, field.name]))
            fitted = _fit(kind, value)
            if fitted is _MISFIT or not _within(field.metadata, fitted):
                raise UserError(
                    f"{name}={value!r} is not allowed: it must be {_allowed(kind, field.metadata)}"
                )
            object.__setattr__(self, field.name, fitted)

    def plain(self) -> dict[str, Any]:
        """Return the settings as JSON types, with class name and version: what is hashed and recorded."""
        fields: dict[str, Any] = {}
        for f in filter(self._counts, dataclasses.fields(self)):
            value = _plain(getattr(self, f.name))
            fields |= f.metadata["recorded"][value] if "recorded" in f.metadata else {f.name: value}
        return {"kind": type(self).__name__, "version": self.version, **fields}

    def _counts(self, field: dataclasses.Field) -> bool:
        """Return whether a field is hashed with the value that it has here."""
        if not field.metadata.get("hashed", True):
            return False
        return "omitted" not in field.metadata or getattr(self, field.name) != field.metadata["omitted"]

    def key(self) -> str:
        """Return the content hash: 16 hex digits of the SHA-256 of `plain()`."""
        return digest(self.plain())


def digest(plain: Any) -> str:
    """Return 16 hex digits of the SHA-256 of a JSON value, whatever the order of its keys."""
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


_MISFIT = object()
LIMITS = {"above": operator.gt, "at_least": operator.ge, "at_most": operator.le}  # of `option`


def _fit(kind: Any, value: Any) -> Any:
    """Return the value as `kind`, or _MISFIT. Only lossless steps are taken, such as list to tuple."""
    origin = typing.get_origin(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        fits = (_fit(option, value) for option in typing.get_args(kind))
        return next((fit for fit in fits if fit is not _MISFIT), _MISFIT)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return _MISFIT
        parts = tuple(_fit(typing.get_args(kind)[0], part) for part in value)
        return _MISFIT if any(part is _MISFIT for part in parts) else parts
    if origin is dict:
        return dict(value) if isinstance(value, typing.Mapping) else _MISFIT
    if kind is type(None):
        return None if value is None else _MISFIT
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind in (int, float) and isinstance(value, bool):
        return _MISFIT
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        return _MISFIT
    return value if isinstance(value, kind) else _MISFIT


def _within(bounds: typing.Mapping[str, Any], value: Any) -> bool:
    if value is None:
        return True
    inside = all(test(value, bounds[name]) for name, test in LIMITS.items() if name in bounds)
    return inside and ("among" not in bounds or value in bounds["among"])


def _allowed(kind: Any, bounds: typing.Mapping[str, Any]) -> str:
    if "among" in bounds:
        return "one of " + ", ".join(map(str, bounds["among"]))
    kinds = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        type(None): "null",
    }
    text = " or ".join(words.get(k, getattr(k, "__name__", str(k))) for k in kinds)
    return " ".join(
        [text, *(f"{name.replace('_', ' ')} {bounds[name]}" for name in LIMITS if name in bounds)]
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Settings):
        return value.plain()
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return value
