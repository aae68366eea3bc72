"""Find the record of a run: an exact match, else the nearest one and the settings that differ."""

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teq import record
from teq.data.sources import SOURCES
from teq.models.folder import Folder
from teq.record import Record
from teq.report.layout import WEIGHTS
from teq.spec import UserError

if TYPE_CHECKING:
    from teq.pipeline.settings import Run

MISSING = "nothing"
METHOD = ("transform", "quantizer", "finetune")  # the last one only where there is one
ADDED = ("kl", "top1", "bits_per_byte")  # metrics that a record of an evaluation may lack
AMOUNTS = (".limit", ".rows", ".file")  # how much of a text was read, not how
ADDS = ("kl",)  # options of evaluations that add metrics and change no other


@dataclass(frozen=True)
class Match:
    """A record for a run; `differences` maps settings to (wanted, the record's), empty if exact."""

    record: Record
    unpublished: bool
    differences: Mapping[str, tuple[Any, Any]]


class RecordIndex:
    """All records: the user's own and the published ones.

    A record that lies in both places, byte for byte the same, counts as published.
    """

    def __init__(self, published: Path, own: Path | None = None) -> None:
        shared = {r.file.name: r for r in record.load(published)}
        mine = record.load(own) if own is not None and own.resolve() != published.resolve() else []
        mine = [r for r in mine if r.file.name not in shared or r.data != shared[r.file.name].data]
        for each in mine:
            shared.pop(each.file.name, None)
        self._all = [(each, True) for each in _latest_first(mine)]  # the user's own first
        self._all += [(each, False) for each in _latest_first(shared.values())]
        self._folders: dict[str, str] = {}  # fingerprints of local checkpoints, by path

    @cached_property
    def _by_group(self) -> dict[tuple[Any, ...], list[tuple[Record, bool]]]:
        found: dict[tuple[Any, ...], list[tuple[Record, bool]]] = {}
        for entry in self._all:
            found.setdefault(group_key(entry[0].data["run"]), []).append(entry)
        return found

    def find(
        self,
        run: "Run",
        evaluations: set[str],
        synthetic: bool = False,
        fixed: Collection[str] = (),
        metrics: Collection[str] = (),
    ) -> Match | None:
        """Return the record for the part of `run` that `evaluations` (by name) measure, or None.

        A record that lacks one of `metrics` (`<evaluation>.<name>`) of those that not all have is no answer.

        Settings of evaluations that are not asked for do not count. A local folder's weights are compared as
        they are there now. A record of synthetic weights is only considered where `synthetic` allows it, one
        that differs in a setting of `fixed` never.
        """
        plain, weights = run.plain(), self._weights(run.model.source)
        best: tuple[tuple[Any, ...], Match] | None = None
        wanted = {name: e for e, name in zip(plain["evals"], (e.name for e in run.evals), strict=True)}
        for candidate, unpublished in self._by_group.get(group_key(plain), []):
            if (candidate.synthetic and not synthetic) or not evaluations <= set(candidate.metrics):
                continue
            if any(_lacks(candidate, name) for name in metrics):
                continue
            had = dict(zip(candidate.metrics, candidate.data["run"]["evals"], strict=True))
            differences = dict(
                _differences(
                    _relevant(plain, wanted, evaluations), _relevant(candidate.data["run"], had, evaluations)
                )
            )
            if not differences.keys().isdisjoint(fixed):
                continue
            if candidate.synthetic:  # said by a mark of its own; which checkpoint was meant says nothing more
                differences = {k: v for k, v in differences.items() if not k.startswith("model.source")}
            elif weights is not None and candidate.data["run"]["model"]["source"]["kind"] == "Folder":
                differences |= dict(_differences(weights, candidate.data["identity"], "model.weights"))
            differences |= _parts(candidate, evaluations)
            rank = _rank(candidate, evaluations, differences)
            if best is None or rank < best[0]:
                best = rank, Match(candidate, unpublished, differences)
        return best and best[1]

    def _weights(self, source: Any) -> str | None:
        """Return the identity of a local folder's present weights; None for other sources or no folder."""
        if isinstance(source, Folder) and source.path not in self._folders:
            with contextlib.suppress(UserError, OSError):
                self._folders[source.path] = source.fingerprint()
        return self._folders.get(source.path) if isinstance(source, Folder) else None


def _rank(candidate: Record, evaluations: set[str], differences: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what the nearest record has least of.

    A real model's comes before a synthetic one's, an exact one before others, one that was measured the same
    way (context; windows, unless all were) before others; then the most that was measured, then the fewest
    settings of the method that differ, then the fewest of all.
    """
    settings = [key for key in differences if not key.endswith(AMOUNTS)]
    alike = {f"{name}.windows" for name in evaluations if None in differences.get(f"{name}.limit", ())}
    named = tuple(f"{name}." for name in evaluations)
    otherwise = sum(key.startswith(named) and key not in alike for key in settings)
    infos = [candidate.metrics[name]["info"] for name in evaluations]
    measured = sum(info.get("windows", 0) + info.get("documents", 0) for info in infos)
    method = sum(key.startswith(METHOD) for key in settings)
    return candidate.synthetic, bool(differences), otherwise, -measured, method, len(differences)


def _latest_first(records: Iterable[Record]) -> list[Record]:
    return sorted(records, key=lambda r: (r.data["created"], r.file.name), reverse=True)


def varying(runs: Iterable["Run"]) -> dict[tuple[Any, ...], set[str]]:
    """Return by model, method and grid the settings in which the runs of such a group differ.

    These tell the cells of a table apart, so that a record which differs in one belongs to another cell.
    """
    first: dict[tuple[Any, ...], dict[str, Any]] = {}
    found: dict[tuple[Any, ...], set[str]] = {}
    for run in runs:
        plain = {key: value for key, value in run.plain().items() if key != "evals"}
        one = first.setdefault(group_key(plain), plain)
        found.setdefault(group_key(plain), set()).update(dict(_differences(one, plain)))
    return found


def _relevant(run: Mapping[str, Any], evals: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    parts = {key: run.get(key) for key in ("model", "dtype", *METHOD)}
    if names:
        parts["eval_dtype"] = run.get("eval_dtype")
    asked = {name: evals.get(name, MISSING) for name in sorted(names)}
    return parts | {
        name: {key: value for key, value in plain.items() if key not in ADDS} if plain != MISSING else plain
        for name, plain in asked.items()
    }


def _lacks(candidate: Record, name: str) -> bool:
    evaluation, _, key = name.rpartition(".")
    if evaluation == WEIGHTS:
        return not candidate.weights
    return key in ADDED and key not in candidate.metrics[evaluation]["values"]


def _parts(candidate: Record, evaluations: set[str]) -> dict[str, tuple[Any, Any]]:
    """Return differences caused by incomplete data: expected and read rows, and a substitute file."""
    read = {name: candidate.metrics[name]["info"] for name in sorted(evaluations)}
    read |= {f"{stage}.calib": text or {} for stage, text in candidate.data["text"].items()}
    found: dict[str, tuple[Any, Any]] = {}
    for name, info in read.items():
        if info.get("partial"):
            found[f"{name}.rows"] = info["expected_rows"], info["rows"]
            wanted = SOURCES.get(info.get("name", ""))
            if wanted is not None and info.get("file") == f"{wanted.sample}.parquet":
                found[f"{name}.file"] = wanted.file, wanted.sample
    return found


def group_key(run: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what a record must share with a run to be shown for it: model, transform, quantizer and grid.

    A method is told by its settings, whatever it is called: the kinds of its stages and the switches that are
    on in them (act-order, clipping), how the grid is found, where scales are, and what is tuned after them.
    """
    grid = run["quantizer"].get("grid") or {}
    stages = [run["transform"], run["quantizer"]]
    switches = [(s["kind"], *sorted(key for key, value in s.items() if value is True)) for s in stages]
    added = (run.get("finetune") or {}).get("parts"), "more_sites" in run["model"]["arch"]
    found = (grid.get(key) for key in ("bits", "group_size", "symmetric", "search"))
    return run["model"]["name"], *switches, *added, *found


def _differences(one: Any, other: Any, path: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in dict.fromkeys([*one, *other]):
            inner = f"{path}.{key}" if path else str(key)
            yield from _differences(one.get(key, MISSING), other.get(key, MISSING), inner)
    elif one != other:
        yield path, (one, other)
