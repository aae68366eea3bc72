"""Content-addressed get-or-make: what was computed once is found again by what it was computed from.

    <root>/<stage>/<key>/   info.json  data.safetensors (where there are tensors)  manifest.json

The manifest is written last and the folder is renamed into place, so a folder that exists is complete.
Manifest and info are checked when an artefact is found, the tensors when they are read. Two processes that
want the same key wait for one another. A stage keeps the state of unfinished work in <root>/../partial until
its result is stored.
"""

import contextlib
import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teq.files import disk, in_use
from teq.files.disk import save_tensors, sha256
from teq.pipeline.cost import cost
from teq.spec import UserError, digest
from teq.stage import Made

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
INFO, DATA, MANIFEST = "info.json", "data.safetensors", "manifest.json"
DAMAGED = "damaged-"
UNSTORABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
TAKEN = (errno.ENOTEMPTY, errno.EEXIST)


@dataclass(frozen=True)
class Artefact:
    """A stage's stored result.

    `cost` is what making it took, also when it was found in the cache; `digest` identifies the result: two
    computations that agree to the bit have the same one.
    """

    key: str
    folder: Path
    info: dict[str, Any]
    cost: dict[str, Any]
    digest: str
    cached: bool

    def tensors(self, device: str = "cpu") -> dict[str, "Tensor"]:
        """Return the stored tensors by name. Raises an error where they were deleted meanwhile."""
        from safetensors.torch import load_file

        there = DATA in _manifest(self.folder)["files"]
        return load_file(self.folder / DATA, device=device) if there else {}


@dataclass(frozen=True)
class Stage:
    """A piece of work of a run: what identifies it, how it is made, and the stages it reads, by name.

    `make(partial, **read)` gives (tensors, info) from the artefacts of the stages it reads; it may keep the
    state of unfinished work in the folder `partial`.
    """

    name: str
    settings: Mapping[str, Any]
    make: Callable[..., Made]
    reads: Mapping[str, "Stage"] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Return the stage's cache key."""
        return digest({"stage": self.name, **self.settings})


class Store:
    """The cache under one folder. One that cannot be written serves what it holds."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._got: dict[Path, Artefact] = {}  # with their tensors checked, or made by this object

    def check(self) -> None:
        """Raise UserError if the folder does not exist and cannot be created."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the cache folder {self.root} cannot be written ({error.strerror}): "
                "set TEQ_HOME to a folder you own"
            ) from error
        if not disk.writable(self.root):
            log.warning("the cache %s cannot be written: it serves what it holds", self.root)
        elif not self._locks_hold():
            log.warning(
                "file locks do not work in %s: two jobs may compute the same stage; set TEQ_HOME to a file "
                "system with locks, or run one job at a time",
                self.root,
            )

    def _locks_hold(self) -> bool:
        """Return whether locks work in the cache; a full disk is reported later, by what writes to it."""
        try:
            return disk.locks_hold(self.root)
        except OSError:
            return True

    def get(self, stage: Stage, device: str, content: bool = False) -> Artefact:
        """Return the result of `stage`, made unless it is stored; with `content` its tensors are as well.

        An artefact whose files do not match their digests is moved aside and made again, and so is one that
        was made from other results than those that all stages before it have now. Raises UserError where the
        disk is full or the folder cannot be written, OSError where it cannot be read.
        """
        folder = self.root / stage.name / stage.key
        if folder in self._got and not self._stale(stage):
            return self._got[folder]
        # first, so that it is not pruned while it is read
        in_use.register(self.root, f"{stage.name}/{stage.key}")
        found = self._open(folder, stage, content)
        if found is None:
            read = {name: self.get(each, device, content=True) for name, each in stage.reads.items()}
            with contextlib.ExitStack() as stack:
                with self._storing(what := f"{stage.name} {stage.key}"):
                    folder.parent.mkdir(parents=True, exist_ok=True)
                    waiting = f"{what}: another process is computing it, waiting"
                    stack.enter_context(disk.locked(Path(f"{folder}.lock"), waiting))
                found = self._open(folder, stage, content, repair=True)
                if found is None:
                    found = self._make(folder, stage, device, read)
        if content or not found.cached:
            self._got[folder] = found
        return found

    def find(self, name: str, key: str) -> Artefact | None:
        """Return the stored result of a stage by name and key with its tensors checked; None is not made."""
        in_use.register(self.root, f"{name}/{key}")
        return self._open(self.root / name / key, Stage(name, {}, _not_made), content=True)

    def _stale(self, stage: Stage) -> bool:
        """Return whether a stage before this one has another result now than this one was made from."""
        try:
            self._check_reads(stage, self._peeked(stage) or {"reads": {}})
        except ValueError:
            return True
        return False

    def peek(self, stage: Stage) -> str | None:
        """Return the digest of the result that is there for `stage`, or None."""
        manifest = self._peeked(stage)
        return None if manifest is None else str(manifest["result"])

    def holds(self, stage: Stage) -> bool:
        """Return whether the result of `stage` is there with its files, whose content is not checked."""
        manifest, folder = self._peeked(stage), self.root / stage.name / stage.key
        return manifest is not None and all((folder / name).exists() for name in manifest["files"])

    def _peeked(self, stage: Stage) -> dict[str, Any] | None:
        with contextlib.suppress(ValueError):
            return _manifest(self.root / stage.name / stage.key)
        return None

    def _make(self, folder: Path, stage: Stage, device: str, read: Mapping[str, Artefact]) -> Artefact:
        what, partial = (
            f"{stage.name} {stage.key}",
            self.root.parent / "partial" / f"{stage.name}-{stage.key}",
        )
        disk.remove_leftovers(folder)
        log.info("%s: computing", what)
        making = disk.making_beside(folder)
        try:
            with self._storing(what):
                making.mkdir()
            results = {name: artefact.digest for name, artefact in read.items()}
            state = partial / digest(results)  # work on other results is not gone on with
            resumed = state.is_dir()
            with cost(device) as spent:
                tensors, info = stage.make(state, **read)
            if resumed:  # the seconds are those of the last process alone
                spent["resumed"] = True
            with self._storing(what):
                manifest = {"settings": stage.settings, "cost": spent, "reads": results}
                result = _write(making, tensors, info, manifest)
                try:
                    making.rename(folder)
                except OSError as error:
                    # another process, on a file system whose locks do not lock, was faster
                    theirs = self._open(folder, stage, content=True) if error.errno in TAKEN else None
                    if theirs is None:
                        raise
                    log.warning("%s: another process stored it first: do locks work there?", what)
                    return theirs
        finally:
            shutil.rmtree(making, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
        log.info("%s: done in %.1f s", what, spent["seconds"])
        return Artefact(folder.name, folder, info, spent, result, cached=False)

    @contextlib.contextmanager
    def _storing(self, what: str) -> Iterator[None]:
        """Context manager: a full disk and a folder that cannot be written are UserErrors."""
        try:
            yield
        except OSError as error:
            if error.errno not in UNSTORABLE:
                raise
            raise UserError(
                f"the cache folder {self.root} cannot be written ({error.strerror}), {what} is not stored: "
                "free space, or set TEQ_HOME to a folder you own; the same command goes on from what was kept"
            ) from error

    def _open(self, folder: Path, stage: Stage, content: bool, repair: bool = False) -> Artefact | None:
        """Return the artefact in `folder`, or None; `repair` (under the lock) moves unusable ones aside."""
        if not folder.is_dir():
            return None
        pruned = False
        try:
            manifest = _manifest(folder)
            _check_file(folder, INFO, manifest)
            info = json.loads((folder / INFO).read_text())
            self._check_reads(stage, manifest)
            if content and DATA in manifest["files"]:
                pruned = not (folder / DATA).exists()
                _check_file(folder, DATA, manifest)
        except (ValueError, FileNotFoundError) as error:
            if repair:
                log.warning("%s in the cache cannot be used (%s): it is computed again", folder, error)
                with contextlib.suppress(FileNotFoundError):  # without locks another process may be faster
                    if pruned:  # there is nothing in it worth keeping
                        shutil.rmtree(folder)
                    else:
                        folder.rename(folder.parent / f"{folder.name}.{DAMAGED}{time.time_ns()}")
            return None
        log.info("%s %s: cached", folder.parent.name, folder.name)
        with contextlib.suppress(OSError):  # it may be another user's; the time is that of the last use
            os.utime(folder / MANIFEST)
        return Artefact(folder.name, folder, info, manifest["cost"], manifest["result"], cached=True)

    def _check_reads(self, stage: Stage, manifest: Mapping[str, Any]) -> None:
        """Raise ValueError if an artefact, or one before it, was made from other results than are stored."""
        for name, read in stage.reads.items():
            if (above := self._peeked(read)) is not None:
                if manifest["reads"].get(name) != above["result"]:
                    raise ValueError(f"{stage.name} were made from other {name} than those that are here now")
                self._check_reads(read, above)


def _write(folder: Path, tensors: Mapping[str, "Tensor"], info: dict[str, Any], about: dict[str, Any]) -> str:
    """Write an artefact's files, and `about` it in the manifest. Returns the digest of the result."""
    folder.mkdir(exist_ok=True)  # if it was deleted meanwhile, the work is not lost
    (folder / INFO).write_text(json.dumps(info, allow_nan=False))
    if tensors:
        save_tensors(folder / DATA, tensors)
    written = {file.name: sha256(file) for file in sorted(folder.iterdir())}
    manifest = about | {"files": written, "result": written.get(DATA, written[INFO])[:16]}
    (folder / MANIFEST).write_text(json.dumps(manifest | {"digest": digest(manifest)}, indent=1))
    return str(manifest["result"])


def _not_made(partial: Path, **_: Artefact) -> Made:
    raise AssertionError("a stage that is looked up by its key is not made")


def _manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of an artefact's folder. Raises ValueError where it is damaged or missing."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    if not isinstance(manifest, dict) or manifest.pop("digest", None) != digest(manifest):
        raise ValueError(f"{MANIFEST} was edited")
    if not {"files", "cost", "reads", "result"} <= manifest.keys():
        raise ValueError(f"{MANIFEST} is of another version")
    return manifest


def _check_file(folder: Path, name: str, manifest: Mapping[str, Any]) -> None:
    """Raise ValueError where a file of an artefact is missing or is not the one that was written."""
    try:
        if sha256(folder / name) != manifest["files"][name]:
            raise ValueError(f"{name} does not match its digest")
    except FileNotFoundError:
        raise ValueError(f"{name} is missing") from None
