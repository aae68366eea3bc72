"""model=auto: the family of a checkpoint in a folder or on the hub, found by its model_type."""

import json

import fake_hub
import pytest
from conftest import run_python, save_tiny

from teq import config
from teq.models.arch import families
from teq.spec import UserError

READ = """
import json, pathlib
from huggingface_hub import constants
from teq import config
(job,) = config.jobs(["model=auto", "model.path=someone/tiny", "method=rtn"])
model = job.run.model
cached = sorted(file.name for file in pathlib.Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*/*"))
lm = model.load("float32", "cpu")
print(json.dumps([model.name, model.arch.name, lm.identity, len(lm.model.model.layers), cached]))
"""


@pytest.mark.parametrize("name", [name for name in families() if name != "gpt2"])
def test_the_family_of_a_folder_is_found(tmp_path, name):
    """Of falcon's three layouts it is the one whose norms the model has."""
    folder = save_tiny(f"tiny-{name}", tmp_path / "some-model")
    (job,) = config.jobs(["model=auto", f"model.path={folder}", "method=rtn"])
    assert job.run.model.arch.name == name
    assert job.run.model.name == "some-model"


def test_a_gpt2_folder_loads_with_linears_and_the_same_logits(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config

    from teq.models.synthetic import byte_tokenizer

    plain = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=258, n_embd=64, n_layer=2, n_head=4)
    ).eval()
    plain.save_pretrained(tmp_path / "gpt2")
    byte_tokenizer(False).save_pretrained(tmp_path / "gpt2")
    (job,) = config.jobs(["model=auto", f"model.path={tmp_path / 'gpt2'}", "method=rtn"])
    lm = job.run.model.load("float32", "cpu")
    tokens = torch.arange(40)[None]
    torch.testing.assert_close(lm.model(tokens).logits, plain(tokens).logits)
    assert lm.model.transformer.h[0].mlp.c_fc.weight.shape == (256, 64)


def test_the_family_of_a_hub_id_is_found_by_its_configuration_alone(tmp_path):
    folder = save_tiny("tiny-qwen3", tmp_path / "model")
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    with fake_hub.serve({"someone/tiny": {"commit": "4" * 40, "files": files}}) as endpoint:
        (line,) = run_python(READ, endpoint, tmp_path / "home", TEQ_HOME=str(tmp_path / "teq"))
    assert json.loads(line) == ["tiny", "qwen3", f"someone/tiny@{'4' * 40}", 2, ["config.json"]]


def test_the_architecture_may_be_given(tmp_path):
    folder = save_tiny("tiny-mistral", tmp_path / "model")
    (job,) = config.jobs(["model=auto", f"model.path={folder}", "model/arch=llama", "method=rtn"])
    assert job.run.model.arch.name == "llama"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"model=auto needs a checkpoint: give model\.path=<folder or hub id>"),
        (["model.path=./nowhere"], r"model\.path=\./nowhere is not a folder"),
        (["model.path=a/b/c"], r"model\.path=a/b/c is not a folder"),
        (["model.path=someone/tiny"], r"someone/tiny@main is not in the local hub cache"),
        (
            ["model.path=someone/tiny", "model.weights=synthetic"],
            r"needs dimensions, which model=auto has not",
        ),
    ],
)
def test_what_auto_cannot_find_is_refused(hub_cache, overrides, message):
    with pytest.raises(UserError, match=message):
        config.jobs(["model=auto", "method=rtn", *overrides])


def test_an_unknown_family_is_refused_with_the_known_ones(folder):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "olmo"}))
    with pytest.raises(
        UserError, match=r"has model_type=olmo, which is no known family: .*bloom, falcon, gem"
    ):
        config.jobs(["model=auto", f"model.path={folder}", "method=rtn"])
