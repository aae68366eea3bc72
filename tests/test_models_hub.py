"""Checkpoints of the hub."""

import json
import types

import pytest

from teq import config, models
from teq.models import hub
from teq.models.checkpoint import Hub
from teq.spec import UserError


def arch_of(family):
    (job,) = config.jobs([f"model=tiny-{family}"])
    return job.run.model.arch


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
