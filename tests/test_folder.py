"""Checkpoints in folders."""

import pytest
import torch
from conftest import source_of
from safetensors.torch import load_file, save_file

from teq import config, models
from teq.models.checkpoint import Folder
from teq.models.synthetic import build
from teq.spec import UserError


def test_folder_loads_the_weights_it_was_saved_from(folder):
    lm = models.Checkpoint(name="x", source=Folder(path=str(folder)), arch=arch_of("llama")).load(
        "float32", "cpu"
    )
    expected = build(source_of("tiny-llama")).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in lm.model.state_dict().items())
    assert not any(p.requires_grad for p in lm.model.parameters()) and not lm.model.training


def arch_of(family):
    (job,) = config.jobs([f"model=tiny-{family}"])
    return job.run.model.arch


def test_folder_identity_is_its_content_not_its_place(folder, tmp_path):
    import shutil

    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    first = Folder(path=str(folder)).fingerprint()
    assert Folder(path=str(moved)).fingerprint() == first
    weights = moved / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert Folder(path=str(moved)).fingerprint() != first


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("", "is not a folder"),
        ("config.json", "holds no config.json"),
        ("model.safetensors", "holds no safetensors"),
    ],
)
def test_incomplete_folders_are_refused_before_loading(folder, tmp_path, remove, message):
    path = folder if remove else tmp_path / "nowhere"
    if remove:
        (folder / remove).unlink()
    with pytest.raises(UserError, match=message):
        Folder(path=str(path)).fingerprint()


def test_pickled_weights_are_not_loaded(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="no pickles are loaded"):
        Folder(path=str(folder)).fingerprint()


def test_damaged_weights_are_one_line(folder):
    (folder / "model.safetensors").write_bytes(b"not safetensors")
    checkpoint = models.Checkpoint(name="broken", source=Folder(path=str(folder)), arch=arch_of("llama"))
    with pytest.raises(UserError, match="the model could not be loaded from") as caught:
        checkpoint.load("float32", "cpu")
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_all_its_tensors_is_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if "up_proj" not in k},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    checkpoint = models.Checkpoint(name="part", source=Folder(path=str(folder)), arch=arch_of("llama"))
    with pytest.raises(UserError, match=r"lacks 2 of the model's tensors, model\.layers\.0\.mlp\.up_proj"):
        checkpoint.load("float32", "cpu")


def test_a_folders_identity_covers_the_tokenizer(folder):
    (folder / "merges.txt").write_text("a b")
    before = Folder(path=str(folder)).fingerprint()
    (folder / "merges.txt").write_text("a c")
    assert Folder(path=str(folder)).fingerprint() != before
