"""How far a value walks: the rooms of the package that are handed `bits`, trained scales, a perplexity.

A room is a folder or a file at the top of teq/. It is entered when its function is called from another room
with the value among its arguments, and passed as well when it returns the value to another room. A function
that was handed down and is called back is no second entry.
"""

import dataclasses
import functools
import pathlib
import sys

import pytest

import run
from teq.grid import Grid

PACKAGE = str(pathlib.Path(run.__file__).resolve().parent / "teq")
ARGV = ["model=tiny-llama", "method=teq+gptq", "bits=5", "group_size=16", "evals=[python-docs]"]
ARGV += [
    "train.steps=2",
    "train.length=48",
    "gptq.samples=2",
    "gptq.length=48",
    "ppl.limit=2",
    "ppl.context=48",
]
SITE = "model.layers.0.input_layernorm"
MOST = {"bits": 10, "scales": 10, "perplexity": 12}


def room(frame):
    """The room of a frame's function, None outside of the package."""
    file = frame.f_code.co_filename
    if not file.startswith(PACKAGE):
        return None
    return file.removeprefix(PACKAGE).split("/")[1].removesuffix(".py")


def parts(value):
    """What an argument holds, one level down."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list | tuple):
        return value[:50]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return []


def holds(value, found, depth=6):
    """Whether `found` is true of a value or of something in it."""
    return found(value) or (depth > 0 and any(holds(part, found, depth - 1) for part in parts(value)))


def is_bits(value):
    """The grid, as settings, plain data, or words of a command line."""
    if isinstance(value, dict):
        return value.get("bits") == 5
    return (isinstance(value, Grid) and value.bits == 5) or (isinstance(value, str) and "bits=5" in value)


def is_scales(value):
    """Scales by site."""
    return isinstance(value, dict) and hasattr(value.get(SITE), "shape")


def is_perplexity(value):
    """The metric, as an object of ours or in a record."""
    return isinstance(value, dict) and isinstance(value.get("ppl"), float)


FOUND = {"bits": is_bits, "scales": is_scales, "perplexity": is_perplexity}


def arguments(frame):
    """The values that a function was called with."""
    code = frame.f_code
    count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4) + bool(code.co_flags & 8)
    return [frame.f_locals.get(name) for name in code.co_varnames[:count]]


def handed_down(frame, stack):
    """Whether a frame's function was among the arguments of one that is running: a call back."""

    def same(value):
        function = getattr(value, "__func__", value)
        return getattr(function, "__code__", None) is frame.f_code

    return any(holds(value, same, 3) for other in stack for value in arguments(other))


@pytest.fixture(scope="module")
def walks(tmp_path_factory):
    """By value: the rooms in the order in which they are passed, and those that are entered again."""
    home = tmp_path_factory.mktemp("home")
    entered = {name: [] for name in FOUND}
    again = {name: set() for name in FOUND}

    def watch(frame, event, returned):
        if event not in ("call", "return") or (here := room(frame)) is None:
            return
        stack, each = [], frame.f_back
        while each is not None:
            if room(each) is not None:
                stack.append(each)
            each = each.f_back
        if stack and room(stack[0]) == here:
            return
        given = arguments(frame) if event == "call" else [returned]
        for name, found in FOUND.items():
            if any(holds(value, found) for value in given):
                passed = [here] if event == "call" or not stack else [here, room(stack[0])]
                entered[name] += [each for each in passed if each not in entered[name]]
                if event == "return":
                    continue
                above = [room(f) for f in stack if any(holds(value, found) for value in arguments(f))]
                if here in above and not handed_down(frame, stack):
                    again[name].add(f"{' < '.join([f'{here}.{frame.f_code.co_name}', *above])}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEQ_HOME", str(home))
        patch.setattr(sys, "argv", ["run.py", *ARGV])
        sys.setprofile(watch)
        try:
            status = run.main(ARGV)
        finally:
            sys.setprofile(None)
    assert status == 0
    return entered, again


@pytest.mark.parametrize("name", FOUND)
def test_a_value_passes_few_rooms_and_none_twice(walks, name):
    entered, again = walks
    print(f"{name}: {' -> '.join(entered[name])}")
    assert not again[name]
    assert 2 < len(entered[name]) <= MOST[name]
