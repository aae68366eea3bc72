"""From a command line to checked jobs."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from teq.config.checks import check_choices, check_keys, one_line
from teq.config.composition import Composed, NeedsHydra, defaults, merged
from teq.config.options import LAUNCHER, LAYOUT, experiment, flat, folder, groups, prepare_environment
from teq.config.resolve import BASIC, Job, job, without
from teq.spec import UserError

INTEGER_GROUPS = ("bits", "group_size")


def quoted(argv: Sequence[str]) -> list[str]:
    """Return the command line as Hydra wants it: `-m` first, the values of `bits` and `group_size` quoted.

    Hydra's parser takes no flag between overrides. The two are config groups whose options are called `4`,
    `-1`, ...; Hydra reads a bare 4 as a number and refuses it as the name of an option.
    """
    out = []
    argv = sorted(argv, key=lambda word: word not in ("-m", "--multirun"))
    for word in argv:
        name, equals, value = word.partition("=")
        if equals and name in INTEGER_GROUPS and not set(value) & set("'\"[](){}"):
            word = f"{name}={','.join(repr(part) for part in value.split(','))}"
        out.append(word)
    return out


def jobs(argv: Sequence[str]) -> list[Job]:
    """Return every run of a command line. Raises UserError with one line for each problem."""
    arguments, strange = get_args_parser().parse_known_args(quoted(argv))
    if strange:
        raise UserError(f"{strange[0]} is not understood: `python run.py --help` shows what is")
    found: list[Job] = []
    problems: list[str] = []
    prepare_environment()
    with initialize_config_dir(str(folder("conf")), version_base="1.3"):
        every, launcher = _expand(arguments.overrides, arguments.multirun)
        for overrides in every:
            try:
                ours = [line for line in overrides if not _is_hydras(line)]
                _add_group_sizes(ours)
                cfg, choices = _composed(ours)
                check_choices(cfg, choices, ours)
                name, added = choices.get("experiments"), [line for line in ours if line.startswith("+")]
                if name or added:
                    plain = [line for line in ours if line not in added]
                    base = _composed([line for line in plain if not line.startswith("experiments=")])[0]
                    check_keys(cfg, base, added, name)
                found.append(replace(job(cfg, choices, overrides), launcher=launcher))
            except UserError as error:
                problems += str(error).splitlines()
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return found


def _add_group_sizes(overrides: Sequence[str]) -> None:
    """Add to the group `group_size` the numbers that have no file.

    Hydra takes options from memory too, and its launchers hand these on to their workers.
    """
    for override in overrides:
        number = re.fullmatch(r"group_size=['\"]?([1-9]\d*)['\"]?", override)
        if number and not (folder("conf") / "group_size" / f"{number[1]}.yaml").is_file():
            ConfigStore.instance().store(
                number[1], {"group_size": int(number[1])}, "group_size", package="_global_"
            )


def _expand(overrides: list[str], multirun: bool) -> tuple[list[list[str]], str]:
    """Return the override lists of the single jobs, as Hydra's sweeper makes them, and the launcher."""
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        for one in parsed:
            if one.is_sweep_override() and one.key_or_group == "experiments":
                raise UserError(f"{one.input_line} names several experiments: run one after the other")
            several = [value for value in _values(one) if isinstance(value, list | dict)]
            if several and (one.key_or_group in defaults() or "/" in one.key_or_group):
                raise UserError(
                    f"{one.input_line} is not allowed: {one.key_or_group} takes the name of one option, "
                    "without brackets; a sweep (-m) takes several names with commas between them"
                )
            if one.is_delete() and not _is_hydras(one.input_line or ""):
                raise UserError(
                    f"{one.input_line} takes away what every run reads: leave it out, or give it a value "
                    "(null leaves it to the recipe)"
                )
        fixed = [o.input_line for o in parsed if not o.is_sweep_override() and o.input_line]
        params, mode, launcher = _sweep([o for o in fixed if o.startswith("experiments=") or _is_hydras(o)])
        if not multirun and "MULTIRUN" not in mode:
            swept = [o.input_line for o in parsed if o.is_sweep_override()]
            if swept:
                raise UserError(f"{swept[0]} names several values: add -m (--multirun) to run each of them")
            return [overrides], BASIC
        lines = [f"{key}={value}" for key, value in params.items()] + overrides
        every = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(lines), None)[0]
        return every, launcher
    except (HydraException, yaml.YAMLError) as error:
        raise UserError(one_line(error, overrides)) from error


def _values(override: Override) -> list[Any]:
    """Return what an override sets, in each job of a sweep."""
    value = override.value()
    return value.list if isinstance(value, ChoiceSweep) else [value]


def _sweep(overrides: list[str]) -> tuple[Mapping[str, Any], str, str]:
    """Return the sweep's parameters, Hydra's mode and the launcher's name.

    They are read from the experiment's file where nothing else sets them.
    """
    name = overrides[-1].partition("=")[2] if overrides else None
    if not any(map(_is_hydras, overrides)) and (name is None or name in groups()["experiments"]):
        file = experiment(name) if name else {}
        hydra = file.get("hydra") or {}
        sweeper = hydra.get("sweeper") or {}
        if "defaults" not in file and hydra.keys() <= {"mode", "sweeper"} and sweeper.keys() <= {"params"}:
            return sweeper.get("params") or {}, str(hydra.get("mode")), BASIC
    hydra = _hydra(overrides).hydra
    return hydra.sweeper.params or {}, str(hydra.mode), hydra.runtime.choices[LAUNCHER]


def _composed(overrides: list[str]) -> Composed:
    """Return the configuration and the choices of some overrides, by Hydra only where it is needed."""
    try:
        return merged(overrides)
    except (NeedsHydra, OSError, yaml.YAMLError):
        return _by_hydra(overrides)


def _by_hydra(overrides: list[str]) -> Composed:
    composed = _hydra(overrides)
    return without(composed, ("hydra", LAYOUT)), dict(composed.hydra.runtime.choices)


def _hydra(overrides: list[str]) -> DictConfig:
    try:
        return compose("config", overrides, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        known = [key for key, _ in flat(_composed([])[0])]
        raise UserError(one_line(error, overrides, known)) from error


def _is_hydras(override: str) -> bool:
    """Return whether an override is one of Hydra's settings, which no run reads."""
    return override.lstrip("+~").startswith(("hydra.", "hydra/"))
