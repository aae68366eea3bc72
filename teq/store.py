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
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from teq import measure
from teq.files import save_tensors, sha256, umask
from teq.spec import UserError, digest

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
Made = tuple[Mapping[str, "Tensor"], dict[str, Any]]
INFO, DATA, MANIFEST = "info.json", "data.safetensors", "manifest.json"
MAKING, DAMAGED = "making-", "damaged-"
ABANDONED = 7 * 24 * 3600.0  # seconds after which an unfinished folder of another machine is deleted
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class Artefact:
    """A stage's stored result. `cost` is what making it took, even when this call found it made; `digest`
    identifies the result: two computations that agree to the bit have the same one.
    """

    key: str
    folder: Path
    info: dict[str, Any]
    cost: dict[str, Any]
    digest: str
    cached: bool

    def tensors(self, device: str = "cpu") -> dict[str, "Tensor"]:
        """The stored tensors by name."""
        from safetensors.torch import load_file

        file = self.folder / DATA
        return load_file(file, device=device) if file.is_file() else {}


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
        """The stage's cache key."""
        return digest({"stage": self.name, **self.settings})


class Store:
    """The cache under one folder. One that cannot be written serves what it holds."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._got: dict[Path, Artefact] = {}  # with their tensors checked, or made by this object

    def check(self) -> None:
        """Raise UserError when the folder cannot be written."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe = self.root / f".{socket.gethostname()}-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"the cache folder {self.root} cannot be written ({error.strerror}): "
                "set TEQ_HOME to a folder you own"
            ) from error

    def get(self, stage: Stage, device: str, content: bool = False) -> Artefact:
        """The result of `stage`, made unless it is there already; with `content` its tensors are as well.

        An artefact whose files do not match their digests is moved aside and made again, and so is one that
        was made from other results than the stages it reads have now. Raises UserError where the disk is full
        or the folder cannot be written, OSError where it cannot be read.
        """
        folder = self.root / stage.name / stage.key
        if folder in self._got:
            return self._got[folder]
        found = self._open(folder, stage, content)
        if found is None:
            read = {name: self.get(each, device, content=True) for name, each in stage.reads.items()}
            with self._locked(folder, f"{stage.name} {stage.key}"):
                found = self._open(folder, stage, content, repair=True)
                if found is None:
                    found = self._make(folder, stage, device, read)
        if content or not found.cached:
            self._got[folder] = found
        return found

    def peek(self, stage: Stage) -> str | None:
        """The digest of the result that is there for `stage`, or None."""
        try:
            manifest = _manifest(self.root / stage.name / stage.key)
        except (FileNotFoundError, ValueError):
            return None
        return str(manifest["result"])

    def _make(self, folder: Path, stage: Stage, device: str, read: Mapping[str, Artefact]) -> Artefact:
        what, partial = f"{stage.name} {stage.key}", self.partial(stage)
        _remove_leftovers(folder)
        log.info("%s: computing", what)
        owner = f"{socket.gethostname()}-{os.getpid()}"
        making = folder.parent / f"{folder.name}.{MAKING}{owner}-{time.time_ns()}"
        try:
            making.mkdir()
            results = {name: artefact.digest for name, artefact in read.items()}
            state = partial / digest(results)  # work on other results is not gone on with
            resumed = state.is_dir()
            with measure.cost(device) as spent:
                tensors, info = stage.make(state, **read)
            if resumed:  # the seconds are those of the last process alone
                spent["resumed"] = True
            result = self._write(making, tensors, info, spent, stage, results)
            try:
                making.rename(folder)
            except OSError as error:
                # another process, on a file system whose locks do not lock, was faster
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                if (theirs := self._open(folder, stage, content=True)) is None:
                    raise
                log.warning("%s: another process stored it first: do the file system's locks work?", what)
                return theirs
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
                raise
            raise UserError(
                f"{what} could not be stored in {self.root} ({error.strerror}): free space there, or set "
                "TEQ_HOME to a folder you own; the same command goes on from what was kept"
            ) from error
        finally:
            shutil.rmtree(making, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
        log.info("%s: done in %.1f s", what, spent["seconds"])
        return Artefact(folder.name, folder, info, spent, result, cached=False)

    def partial(self, stage: Stage) -> Path:
        """The folder for the state of unfinished work on `stage`."""
        return self.root.parent / "partial" / f"{stage.name}-{stage.key}"

    def _write(
        self,
        folder: Path,
        tensors: Mapping[str, "Tensor"],
        info: dict[str, Any],
        spent: dict[str, Any],
        stage: Stage,
        reads: Mapping[str, str],
    ) -> str:
        (folder / INFO).write_text(json.dumps(info, allow_nan=False))
        if tensors:
            save_tensors(folder / DATA, tensors)
        files = {file.name: sha256(file) for file in sorted(folder.iterdir())}
        manifest = {"settings": stage.settings, "cost": spent, "files": files, "reads": reads}
        manifest["result"] = files.get(DATA, files[INFO])[:16]
        (folder / MANIFEST).write_text(json.dumps(manifest | {"digest": digest(manifest)}, indent=1))
        return str(manifest["result"])

    def _open(self, folder: Path, stage: Stage, content: bool, repair: bool = False) -> Artefact | None:
        """The artefact in `folder`, or None; `repair` (under the lock) moves aside what cannot be used."""
        if not folder.is_dir():
            return None
        try:
            manifest = _manifest(folder)
            _check_file(folder, INFO, manifest)
            info = json.loads((folder / INFO).read_text())
            for name, read in stage.reads.items():
                now = self.peek(read)
                if now is not None and manifest.get("reads", {}).get(name) != now:
                    raise ValueError(f"it was made from other {name} than those that are here now")
            if content and DATA in manifest["files"]:
                _check_file(folder, DATA, manifest)
        except ValueError as error:
            if repair:
                log.warning("%s in the cache cannot be used (%s): it is computed again", folder, error)
                if (folder / DATA).is_file():
                    folder.rename(folder.parent / f"{folder.name}.{DAMAGED}{time.time_ns()}")
                else:  # there is nothing in it worth keeping: its tensors were pruned
                    shutil.rmtree(folder)
            return None
        log.info("%s %s: cached", folder.parent.name, folder.name)
        return Artefact(folder.name, folder, info, manifest["cost"], manifest["result"], cached=True)

    @contextlib.contextmanager
    def _locked(self, folder: Path, what: str) -> Iterator[None]:
        """Context manager: holds the lock of one key, where the file system has locks."""
        self.check()
        folder.parent.mkdir(exist_ok=True)
        lock = filelock.FileLock(f"{folder}.lock", mode=0o666 & ~umask())
        try:
            try:
                lock.acquire(timeout=1)
            except filelock.Timeout:
                log.info("%s: another process is computing it, waiting", what)
                lock.acquire()
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                raise
            log.warning("%s has no file locks: two processes may compute the same stage", self.root)
        try:
            yield
        finally:
            lock.release()


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artefact's folder. Raises ValueError where it is damaged or missing."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    if not isinstance(manifest, dict) or manifest.pop("digest", None) != digest(manifest):
        raise ValueError(f"{MANIFEST} was edited")
    return manifest


def _check_file(folder: Path, name: str, manifest: Mapping[str, Any]) -> None:
    """Raise ValueError where a file of an artefact is missing or is not the one that was written."""
    try:
        if sha256(folder / name) != manifest["files"][name]:
            raise ValueError(f"{name} does not match its digest")
    except FileNotFoundError:
        raise ValueError(f"{name} is missing") from None


def _remove_leftovers(folder: Path) -> None:
    """Delete what processes that have ended left unfinished of one key."""
    for leftover in folder.parent.glob(f"{folder.name}.{MAKING}*"):
        host, _, rest = leftover.name.partition(MAKING)[2].rpartition("-")[0].rpartition("-")
        with contextlib.suppress(FileNotFoundError):  # its owner was faster
            old = time.time() - leftover.stat().st_mtime > ABANDONED
            if old or (host == socket.gethostname() and not _alive(int(rest))):
                shutil.rmtree(leftover, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
