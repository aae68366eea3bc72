"""Settings: what they refuse, and that their key is their content."""

from dataclasses import dataclass

import pytest

from teq.data.texts import Calibration
from teq.grid import Grid
from teq.quantizers.gptq.settings import Gptq
from teq.spec import Settings, UserError, option
from teq.transforms.teq.settings import Teq

TEQ = {
    "init": "ones",
    "steps": 1,
    "lr": 1e-3,
    "batch": 1,
    "length": 8,
    "parameter": "clip",
    "profile": "paper",
}


def teq(**changes):
    return Teq(**{"grid": Grid(bits=3, group_size=16), "calib": Calibration(), **TEQ, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0}, "train.lr=0 is not allowed: it must be a number above 0"),
        ({"lr": -1e-3}, "train.lr=-0.001"),
        ({"lr": "abc"}, "train.lr='abc' is not allowed: it must be a number above 0"),
        ({"lr": float("nan")}, "train.lr=nan"),
        ({"steps": -1}, "train.steps=-1 is not allowed: it must be a whole number at least 0"),
        ({"steps": 1.5}, "train.steps=1.5"),
        ({"steps": True}, "train.steps=True"),
        ({"parameter": "exp"}, "train.parameter='exp' is not allowed: it must be one of clip, log"),
        ({"init": None}, "init=None is not allowed: it must be one of ones, inv_sqrt, awq, smoothquant"),
    ],
)
def test_bad_values_name_the_option_the_value_and_what_is_allowed(changes, message):
    with pytest.raises(UserError) as caught:
        teq(**changes)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "grid", [{"bits": 0}, {"bits": 9}, {"bits": "x"}, {"group_size": 0}, {"group_size": 7.5}]
)
def test_bad_grids(grid):
    with pytest.raises(UserError, match=next(iter(grid))):
        Grid(**{"bits": 3, "group_size": 64, **grid})


def test_key_is_the_content():
    assert teq().key() == teq(lr=0.001).key()
    assert teq(steps=2).key() != teq().key()
    assert teq(grid=Grid(bits=4, group_size=16)).key() != teq().key()
    assert teq(length=8).key() == teq(length=8).key()


def test_key_does_not_depend_on_how_a_number_was_written():
    assert teq(lr=1).key() == teq(lr=1.0).key()


def test_version_is_in_the_key():
    @dataclass(frozen=True, kw_only=True)
    class Stage(Settings):
        width: int = option(1, at_least=1)

    before = Stage().key()
    Stage.version = 2
    assert Stage().key() != before


def test_settings_of_two_stages_never_share_a_key():
    common = {"grid": Grid(bits=3, group_size=64), "calib": Calibration()}
    gptq = Gptq(samples=1, length=2, **common)
    assert gptq.plain()["kind"] == "Gptq" and gptq.key() != teq().key()
