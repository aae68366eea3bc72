"""Checks of composed configurations, and Hydra's errors, each in one line."""

import difflib
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.errors import ConfigCompositionException, MissingConfigException
from hydra.utils import get_class

from teq.config.options import INTERNAL, LAUNCHER, flat, folder, groups, option_names, read
from teq.spec import UserError

RENAMED = {"gptq.act_order": "gptq.order=act", "gptq.static_groups": "gptq.order=static"}
LAUNCHERS = {  # that Hydra's documentation names, with the extra of pyproject.toml that installs them
    "joblib": "joblib",
    "ray": "ray",
    "ray_aws": "ray",
    "submitit_local": "slurm",
    "submitit_slurm": "slurm",
}
OPTION = re.compile(r"\$\{([\w.]+)\}")  # a value that is an option's
MAPS = ("tasks.limit", "ppl.limit")  # options whose value may be a map


def one_line(error: Exception, overrides: Sequence[str], known: Sequence[str] = ()) -> str:
    """Condense a Hydra error to one line with a suggestion out of the keys `known`."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        if group == "group_size":
            return f"group_size={name} is not allowed: it must be -1 (whole rows) or a whole number above 0"
        if group == LAUNCHER and name in LAUNCHERS:
            chosen = next((line for line in overrides if line.startswith(f"{group}=")), f"{group}={name}")
            return f"{chosen} is not installed: run pip install -e '.[{LAUNCHERS[name]}]' next to run.py"
        if (options := error.options) is not None:
            if not group.startswith("hydra/"):
                options = option_names(folder("" if group == "experiments" else "conf") / group)
            return f"{group}={name} is not allowed: it must be one of {', '.join(options)}"
    text = " ".join(str(error).split())
    if isinstance(error, ConfigCompositionException) and "Could not override" in text:
        key = text.split("'")[1]
        if key in RENAMED:
            return _renamed(key)
        close = difflib.get_close_matches(key, [*known, *groups()], 1)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"there is no option {key!r}: {hint}`python run.py --help` lists them all"
    return f"{' '.join(overrides)}: {text}"


def check_choices(cfg: Mapping[str, Any], choices: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Reject options that others override, and a value for a whole section.

    Options are overridden by grid (bits, group_size) and by the method.
    """
    for section, values in read(folder("conf") / "config.yaml").items():
        if section in cfg and isinstance(values, dict) and not isinstance(cfg[section], dict):
            first = next(iter(values))
            raise UserError(
                f"{section}={cfg[section]} is not allowed: set its values, such as {section}.{first}"
            )
    for override in overrides:
        if choices.get("grid") is not None and override.partition("=")[0] in ("bits", "group_size"):
            raise UserError(
                f"{override} has no effect beside grid={choices['grid']}, which sets bits and group_size: "
                f"choose grid={', '.join(groups()['grid'])}"
            )
    given = [override.lstrip("+").partition("=")[::2] for override in overrides]
    given = [(key, value) for key, value in given if "." in key]
    fixed = _fixed_by_method(cfg) if given else {}
    for key, value in given:
        if key in fixed and _at(cfg, key) != fixed[key]:
            said = json.dumps(fixed[key]).strip('"')
            raise UserError(
                f"{key}={value} has no effect beside method={choices['method']}, which sets it to {said}: "
                "leave it out, or choose another method"
            )


def _fixed_by_method(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options for which the method has a value of its own, where its stages' files refer to them.

    The stages are its transform, the search that TEQ starts from, and its quantizer.
    """
    fixed = {}
    for group in ("transform", "quantizer"):
        plain = {(file := read(f)).get("_target_"): file for f in (folder("conf") / group).glob("*.yaml")}
        stage = cfg["method"][group]
        for node in (stage, stage.get(cfg["init"]) or {}):
            for name, value in plain.get(node.get("_target_"), {}).items():
                if (option := OPTION.fullmatch(str(value))) and node[name] != value:
                    fixed[option[1]] = node[name]
    return fixed


def _at(cfg: Mapping[str, Any], key: str) -> Any:
    return functools.reduce(lambda node, part: node[part], key.split("."), cfg)


def check_keys(
    cfg: Mapping[str, Any], base: Mapping[str, Any], added: Sequence[str], experiment: str | None
) -> None:
    """Reject keys of additions (`+key=value`) and experiment files that `base` lacks: nothing reads them."""
    known = [*groups(), *(key for key, _ in flat(base, INTERNAL))]
    problems = []
    for key in _unread(cfg, base):
        what = f"experiments/{experiment}.yaml sets {key!r}, which is no option"
        if source := next((line for line in added if f"{key}.".startswith(f"{_key_of(line)}.")), ""):
            key, what = _key_of(source), f"{source} is read by no run"
        if key in RENAMED:
            problems.append(_renamed(key))
            continue
        close = difflib.get_close_matches(key, known, 1, cutoff=0)
        problems.append(f"{what}: did you mean {close[0]}? `python run.py --help` lists them all")
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))


def _renamed(key: str) -> str:
    return f"{key} is no option any more: give {RENAMED[key]}, or another order (natural, act, static, group)"


def _key_of(addition: str) -> str:
    """Return the key, without its group, of an override such as `++train.steps=3` or `+eval@extra=ptb`."""
    return addition.lstrip("+").partition("=")[0].rpartition("@")[2]


def _unread(cfg: Mapping[str, Any], base: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the leaves of `cfg` that are neither in `base` nor fields of the class that it names."""
    fields = getattr(get_class(base["_target_"]), "__dataclass_fields__", {}) if "_target_" in base else {}
    for key, value in cfg.items():
        if key in base and isinstance(value, dict) and isinstance(base[key], dict):
            yield from _unread(value, base[key], f"{prefix}{key}.")
        elif key not in base and key in fields:
            continue
        elif isinstance(value, dict) and value and f"{prefix}{key}" not in MAPS:
            yield from (name for name, _ in flat(value, (), f"{prefix}{key}."))
        elif key not in base:
            yield f"{prefix}{key}"
