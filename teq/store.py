"""Content-addressed get-or-make: what was computed once is found again by what it was computed from.

    <root>/<stage>/<key>/   info.json  data.safetensors (where there are tensors)  manifest.json

The manifest is written last and the folder is renamed into place, so a folder that exists is complete; its
digests are checked whenever it is opened. Two processes that want the same key wait for one another.
"""

import contextlib
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from teq import measure
from teq.spec import UserError, digest

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
Made = tuple[Mapping[str, "Tensor"], dict[str, Any]]
INFO, DATA, MANIFEST = "info.json", "data.safetensors", "manifest.json"


@dataclass(frozen=True)
class Artefact:
    """A stage's stored result. `cost` is what making it took, even when this call found it made."""

    key: str
    folder: Path
    info: dict[str, Any]
    cost: dict[str, Any]
    cached: bool

    def tensors(self, device: str = "cpu") -> dict[str, "Tensor"]:
        """The stored tensors by name."""
        from safetensors.torch import load_file

        file = self.folder / DATA
        return load_file(file, device=device) if file.is_file() else {}


class Store:
    """The cache under one folder. Raises UserError when the folder cannot be written."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=root):
                pass
        except OSError as error:
            raise UserError(
                f"the cache folder {root} cannot be written ({error.strerror}): "
                "set TEQ_HOME to a folder you own"
            ) from error

    def get(self, stage: str, settings: dict[str, Any], make: Callable[[], Made], device: str) -> Artefact:
        """The result for `settings`, made by `make` (tensors, info) unless it is there already."""
        key = digest({"stage": stage, **settings})
        folder = self.root / stage / key
        folder.parent.mkdir(exist_ok=True)
        if (found := self._open(folder)) is not None:
            return found
        with _locked(folder, f"{stage} {key}"):
            if (found := self._open(folder, repair=True)) is not None:
                return found
            for leftover in folder.parent.glob(f"{key}.making-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            log.info("%s %s: computing", stage, key)
            making = Path(tempfile.mkdtemp(prefix=f"{key}.making-", dir=folder.parent))
            try:
                with measure.cost(device) as spent:
                    tensors, info = make()
                self._write(making, tensors, info, spent, settings)
                making.rename(folder)
            except BaseException:
                shutil.rmtree(making, ignore_errors=True)
                raise
        log.info("%s %s: done in %.1f s", stage, key, spent["seconds"])
        return Artefact(key, folder, info, spent, cached=False)

    def _write(
        self,
        folder: Path,
        tensors: Mapping[str, "Tensor"],
        info: dict[str, Any],
        spent: dict[str, Any],
        settings: Any,
    ) -> None:
        (folder / INFO).write_text(json.dumps(info, allow_nan=False))
        if tensors:
            from safetensors.torch import save_file

            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / DATA)
        files = {file.name: _sha256(file) for file in sorted(folder.iterdir())}
        manifest = {"settings": settings, "cost": spent, "files": files}
        (folder / MANIFEST).write_text(json.dumps(manifest | {"digest": digest(manifest)}, indent=1))

    def _open(self, folder: Path, repair: bool = False) -> Artefact | None:
        """The artefact in `folder`, or None; `repair` (under the lock) removes a damaged one and says so."""
        if not folder.is_dir():
            return None
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            claimed = manifest.pop("digest")
            if claimed != digest(manifest):
                raise ValueError(f"{MANIFEST} was edited")
            for name, expected in manifest["files"].items():
                if _sha256(folder / name) != expected:
                    raise ValueError(f"{name} does not match its digest")
            info = json.loads((folder / INFO).read_text())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            if repair:
                log.warning("%s in the cache is damaged (%s): it is computed again", folder, error)
                shutil.rmtree(folder)
            return None
        log.info("%s %s: cached", folder.parent.name, folder.name)
        return Artefact(folder.name, folder, info, manifest["cost"], cached=True)


@contextlib.contextmanager
def _locked(folder: Path, what: str) -> Iterator[None]:
    lock = filelock.FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=1)
    except filelock.Timeout:
        log.info("%s: another process is computing it, waiting", what)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
