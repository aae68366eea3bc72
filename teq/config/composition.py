"""Composing many configurations that differ in a few choices.

Hydra composes one in 0.1 to 0.2 s, and a report expands hundreds. Here each option of a group is composed
once, by Hydra, and a configuration is put together from those parts in the order of the defaults list:
groups, then the experiment, then single values. What is not that simple (nested groups, additions, deletions,
an experiment with defaults of its own) goes to Hydra as it is. A test holds both against each other.
"""

import copy
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from teq.spec import UserError

GLOBAL = "# @package _global_"
REFERENCE = re.compile(r"\$\{([\w.]+)\}")
Composed = tuple[dict[str, Any], dict[str, Any]]


class Composer:
    """Configurations under the folder `conf`, experiments under `experiments`; `compose` is Hydra's own way.

    Hydra's own node, and that of an experiment's `layout`, are left out: no run reads them.
    """

    def __init__(
        self, compose: Callable[[list[str]], DictConfig], conf: Path, experiments: Path, layout: str
    ) -> None:
        self._hydra = compose
        self._left_out = ("hydra", layout)
        self._folders = {folder.name: folder for folder in conf.iterdir() if folder.is_dir()}
        self._folders["experiments"] = experiments
        self._parse = functools.cache(OverridesParser.create().parse_override)
        self._file = functools.cache(_read)
        self._option = functools.cache(self._composed_option)

    def __call__(self, overrides: Sequence[str]) -> Composed:
        """The configuration of `overrides` without Hydra's own node, interpolations unresolved, and the
        choices.
        """
        parsed = [self._parse(line) for line in overrides]
        if all(self._simple(override) for override in parsed):
            chosen = {o.key_or_group: o.value() for o in parsed if o.key_or_group in self._folders}
            values = {o.key_or_group: o.value() for o in parsed if o.key_or_group not in self._folders}
            node = self._assembled(chosen)
            if all(_assign(node, key.split("."), value) for key, value in values.items()):
                return node, self._defaults[1] | chosen
        return self._plain(list(overrides))

    @functools.cached_property
    def _defaults(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return self._plain([])

    def _simple(self, override: Override) -> bool:
        key = override.key_or_group
        if override.type.name != "CHANGE" or override.package or override.is_sweep_override():
            return False
        if key not in self._folders:
            return not key.startswith("hydra")
        file = self._folders[key] / f"{override.value()}.yaml"
        return key in self._defaults[1] and file.is_file() and not self._nests(file)

    def _nests(self, file: Path) -> bool:
        """Whether a file at the top chooses options of other groups."""
        is_global, content = self._file(file)
        return is_global and "defaults" in content

    def _assembled(self, chosen: Mapping[str, str]) -> dict[str, Any]:
        node = copy.deepcopy(self._defaults[0])
        for group, name in (self._defaults[1] | chosen).items():
            if name is None:
                continue
            is_global, content = self._file(self._folders[group] / f"{name}.yaml")
            if is_global:
                _merge(node, {key: value for key, value in content.items() if key not in self._left_out})
            elif group in chosen:
                node[group] = copy.deepcopy(self._option(group, name))
        return node

    def _composed_option(self, group: str, name: str) -> dict[str, Any]:
        return self._plain([f"{group}={name!r}"])[0][group]

    def _plain(self, overrides: list[str]) -> Composed:
        """As Hydra composes it; choices in the order of the defaults list, which Hydra gives backwards."""
        composed = self._hydra(overrides)
        choices = list(OmegaConf.to_container(composed.hydra.runtime.choices).items())
        kept = {key: value for key, value in reversed(choices) if key in self._folders}
        return without(composed, self._left_out), kept


def without(cfg: DictConfig, keys: Sequence[str]) -> dict[str, Any]:
    """A configuration as plain data, interpolations unresolved, without some of its top keys."""
    return OmegaConf.to_container(OmegaConf.masked_copy(cfg, [key for key in cfg if key not in keys]))


def resolved(part: Any, root: dict[str, Any]) -> Any:
    """`part` of the plain configuration `root` with its interpolations replaced.

    A text that is one reference, such as `${train.steps}`, takes the value there; OmegaConf sees to anything
    else.
    """
    if isinstance(part, dict):
        return {key: resolved(value, root) for key, value in part.items()}
    if isinstance(part, list):
        return [resolved(value, root) for value in part]
    if not isinstance(part, str) or "${" not in part:
        return part
    if (reference := REFERENCE.fullmatch(part)) is None:
        return OmegaConf.to_container(OmegaConf.create({**root, "_part": part}), resolve=True)["_part"]
    value: Any = root
    for key in reference.group(1).split("."):
        if not isinstance(value, dict) or key not in value:
            raise UserError(f"{part} in conf/ refers to a key that is not there")
        value = value[key]
    return resolved(value, root)


def is_hydras(override: str) -> bool:
    """Whether an override is one of Hydra's own settings, which no run reads."""
    return override.lstrip("+~").startswith(("hydra.", "hydra/"))


def key_of(addition: str) -> str:
    """The key, without its group, of an override such as `++train.steps=3` or `+eval@extra=ptb`."""
    return addition.lstrip("+").partition("=")[0].rpartition("@")[2]


def unread(cfg: Mapping[str, Any], base: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of the leaves of `cfg` that are not in `base`, nor fields of the class that it names."""
    fields = getattr(get_class(base["_target_"]), "__dataclass_fields__", {}) if "_target_" in base else {}
    for key, value in cfg.items():
        if key in base and isinstance(value, dict) and isinstance(base[key], dict):
            yield from unread(value, base[key], f"{prefix}{key}.")
        elif key not in base and key in fields:
            continue
        elif isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        elif key not in base:
            yield f"{prefix}{key}"


def flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of a configuration's leaves."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _read(file: Path) -> tuple[bool, dict[str, Any]]:
    """Whether a file's content goes to the top, and the content."""
    return GLOBAL in file.read_text(encoding="utf-8"), OmegaConf.to_container(OmegaConf.load(file))


def _merge(node: dict[str, Any], content: Mapping[str, Any]) -> None:
    for key, value in content.items():
        if isinstance(value, Mapping) and isinstance(node.get(key), dict):
            _merge(node[key], value)
        else:
            node[key] = copy.deepcopy(value)


def _assign(node: Any, path: Sequence[str], value: Any) -> bool:
    """Set an existing leaf; False where there is none, so that Hydra says what it thinks of it."""
    for key in path[:-1]:
        node = node.get(key) if isinstance(node, dict) else None
    if not isinstance(node, dict) or path[-1] not in node or isinstance(node[path[-1]], dict):
        return False
    if isinstance(value, dict):
        return False
    node[path[-1]] = value
    return True
