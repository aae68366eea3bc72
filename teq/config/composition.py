"""Composition of jobs from our flat YAML files.

Hydra takes 0.2 s for a configuration, and a report expands hundreds. Here each file is read once, and a
configuration is merged in the order of the defaults list: groups, then the experiment, then single values.
Anything less simple (additions, deletions, nested groups, an experiment with defaults) is left to Hydra. A
test compares both on every experiment.
"""

import copy
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from teq.config.options import LAYOUT, folder, read

Composed = tuple[dict[str, Any], dict[str, Any]]  # the configuration, and the option of each group


class NeedsHydra(Exception):
    """A configuration is not that simple."""


def merged(overrides: Sequence[str]) -> Composed:
    """Return the configuration of `overrides` without Hydra's node, interpolations unresolved.

    Raises NeedsHydra where only Hydra can compose it, or can say what is wrong.
    """
    primary, choices, values = read(folder("conf") / "config.yaml"), defaults(), {}
    for override in map(_parsed, overrides):
        key, value = override.key_or_group, override.value()
        simple = override.type.name == "CHANGE" and not override.package and not override.is_sweep_override()
        if not simple or (key in choices and not isinstance(value, str)):
            raise NeedsHydra
        (choices if key in choices else values)[key] = value
    node = {key: copy.deepcopy(value) for key, value in primary.items() if key not in ("defaults", "hydra")}
    for group, name in choices.items():
        if name is not None:
            _merge(node, _option(group, name))
    for key, value in values.items():
        _assign(node, key.split("."), value)
    return node, choices


def defaults() -> dict[str, Any]:
    """Return the option of each group that is taken where no override names one, None without one."""
    return {
        group: name
        for default in read(folder("conf") / "config.yaml")["defaults"]
        if isinstance(default, dict)
        for group, name in default.items()
        if not group.startswith("override ")
    }


_parsed = functools.cache(OverridesParser.create().parse_override)


def _option(group: str, name: str) -> dict[str, Any]:
    """Return what an option adds to the configuration."""
    file = folder("" if group == "experiments" else "conf") / group / f"{name}.yaml"
    if not file.is_file():
        raise NeedsHydra
    if "# @package _global_" not in file.read_text(encoding="utf-8"):
        return {group: _expanded(file)}
    content = read(file)
    if "defaults" in content:
        raise NeedsHydra
    return {key: value for key, value in content.items() if key not in ("hydra", LAYOUT)}


def _expanded(file: Path) -> dict[str, Any]:
    """Return the content of a file merged over the options that its defaults list names."""
    node: dict[str, Any] = {}
    content = read(file)
    for default in content.get("defaults", []):
        if default == "_self_":  # comes last anyway
            continue
        ((key, name),) = default.items()
        if name is None:
            continue
        group, _, package = key.partition("@")
        home = folder("conf") / group[1:] if group.startswith("/") else file.parent / group
        _merge(node, {package or group: _expanded(home / f"{name}.yaml")})
    _merge(node, {key: value for key, value in content.items() if key != "defaults"})
    return node


def _merge(node: dict[str, Any], content: Mapping[str, Any]) -> None:
    for key, value in content.items():
        if isinstance(value, Mapping) and isinstance(node.get(key), dict):
            _merge(node[key], value)
        else:
            node[key] = copy.deepcopy(value)


def _assign(node: Any, path: Sequence[str], value: Any) -> None:
    """Set an existing leaf."""
    for key in path[:-1]:
        node = node.get(key) if isinstance(node, dict) else None
    leaf = isinstance(node, dict) and path[-1] in node and not isinstance(node[path[-1]], dict)
    if not leaf or isinstance(value, dict):
        raise NeedsHydra
    node[path[-1]] = value
