"""Sets by name: mirror, hub, cache, refusals; calibration windows."""

import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys

import fake_hub
import pyarrow
import pyarrow.parquet
import pytest
import torch

from teq.data import hub, mirror
from teq.data import texts as corpora
from teq.data.sources import SOURCES
from teq.files.digests import file_digest
from teq.models.synthetic import byte_tokenizer
from teq.spec import UserError
from teq.verbs import prefetch


@pytest.fixture
def unplugged(tmp_path, monkeypatch):
    """No cache, and every attempt to reach a network fails the test."""
    from huggingface_hub import constants

    def attempted(*args, **kwargs):
        raise AssertionError(f"a network call was attempted: {args}")

    monkeypatch.delenv("TEQ_DATA", raising=False)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, attempted)
    monkeypatch.setattr(socket, "getaddrinfo", attempted)


def documents(count, words=3):
    """`count` different documents of `words` words."""
    return [" ".join(f"word{i}x{j}" for j in range(words)) for i in range(count)]


# --- names and places


def test_a_mirror_gives_its_rows_and_says_what_is_missing(write):
    path = write("ptb_text_only/test", sentence=documents(5))
    found = corpora.provenance("ptb-new")
    assert found == {
        "name": "ptb-new",
        "file": "ptb_text_only/test.parquet",
        "sha256": file_digest(path),
        "rows": 5,
        "expected_rows": 3761,
        "partial": True,
    }
    assert corpora.find("ptb-new").table()["sentence"].to_pylist() == documents(5)
    write("ptb_text_only/validation", sentence=documents(3370))
    assert corpora.provenance("ptb")["partial"] is False


def test_c4_new_reads_the_head_of_the_shard(write):
    write("c4/validation", text=documents(1500))
    found = corpora.find("c4-new")
    assert (found.provenance()["rows"], found.partial) == (1100, False)
    assert found.table()["text"].to_pylist() == documents(1100)
    write("c4/validation", text=documents(1025))
    found = corpora.find("c4-new")
    assert (found.provenance()["rows"], found.provenance()["expected_rows"], found.partial) == (
        1025,
        1100,
        True,
    )


def test_the_older_c4_protocol_refuses_a_part_of_the_shard(write):
    write("c4/validation", text=documents(1025))
    with pytest.raises(UserError, match="c4 needs all 45576 documents and the mirror holds 1025: it draws"):
        corpora.provenance("c4")


@pytest.mark.parametrize(
    ("train", "sample", "taken", "partial"),
    [
        (10000, 512, "pile/train", False),
        (100, 512, "pile/validation", True),
        (100, None, "pile/train", True),
        (None, 512, "pile/validation", True),
    ],
)
def test_a_sample_stands_in_where_the_pile_is_not_whole(write, train, sample, taken, partial):
    for file, rows in (("pile/train", train), ("pile/validation", sample)):
        if rows is not None:
            write(file, text=documents(rows))
    found = corpora.find("pile-10k")
    assert (found.file, found.partial) == (taken, partial)
    assert found.provenance()["rows"] == {"pile/train": train, "pile/validation": sample}[taken]


def test_a_file_that_differs_from_its_lock_is_refused(write):
    path = write("ptb_text_only/test", sentence=documents(5))
    lock = path.parent.parent / mirror.LOCK
    entry = {"revision": "a" * 40, "rows": 5, "sha256": file_digest(path)}
    lock.write_text(json.dumps({"ptb_text_only/test": entry}))
    assert corpora.provenance("ptb-new")["revision"] == "a" * 40
    write("ptb_text_only/test", sentence=documents(6))
    with pytest.raises(UserError, match=r"test\.parquet has sha256 .* its lock says .* refused"):
        corpora.provenance("ptb-new")
    lock.write_text("{")
    with pytest.raises(UserError, match=r"teq-lock\.json is damaged"):
        corpora.provenance("ptb-new")


def test_bad_files_are_named_before_anything_loads(write):
    with pytest.raises(UserError, match=r"column 'label' of .* is string: it must be integer"):
        write("piqa/validation", goal=["a"], sol1=["b"], sol2=["c"], label=["0"])
        corpora.provenance("piqa")
    with pytest.raises(
        UserError, match=r"winogrande_xl/validation\.parquet has no column 'answer': it has sentence, "
    ):
        write("winogrande_xl/validation", sentence=["a _ b"], option1=["c"], option2=["d"])
        corpora.provenance("winogrande")
    with pytest.raises(UserError, match="has 0 rows: the whole split has 5153"):
        write("lambada_openai/test", text=pyarrow.array([], "string"))
        corpora.provenance("lambada_openai")
    with pytest.raises(UserError, match="has 5154 rows: the whole split has 5153"):
        write("lambada_openai/test", text=documents(5154))
        corpora.provenance("lambada_openai")
    for content in (b"", b"no parquet at all"):
        write("wikitext-2-raw-v1/test", text=["a"]).write_bytes(content)
        with pytest.raises(UserError, match=r"wikitext-2-raw-v1/test\.parquet is not a Parquet file"):
            corpora.provenance("wikitext2")


def test_unknown_names_and_folders(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="the set 'wikitext3' is unknown: choose one of wikitext2, ptb"):
        corpora.provenance("wikitext3")
    monkeypatch.setenv("TEQ_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="nowhere is not a folder"):
        corpora.provenance("wikitext2")


# --- the hub


@pytest.mark.parametrize("name", ["wikitext2", "c4-new", "hellaswag"])
def test_strict_offline_attempts_no_network_call(unplugged, name):
    with pytest.raises(
        UserError, match=f"{name} is neither.*HF_HUB_OFFLINE.*TEQ_DATA.*prefetch {name}.*hub be reached"
    ):
        corpora.provenance(name)


def run_python(code, endpoint, home, **environment):
    """Run `code` in a process of its own: the hub's client reads its environment when it is imported."""
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "HF_HUB_OFFLINE": "",
    }
    inherited = {key: value for key, value in os.environ.items() if key != "TEQ_DATA"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, **settings, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


READ = """
import json, socket, sys
from teq.data import texts as corpora
from huggingface_hub import constants
if constants.HF_HUB_OFFLINE:
    def attempted(*args, **kwargs):
        raise AssertionError("a network call was attempted")
    socket.socket.connect = socket.getaddrinfo = attempted
for name in ("wikitext2", "ptb-new", "c4-new"):
    found = corpora.find(name)
    table = found.table()
    print(json.dumps([found.provenance(), len(table), table[0][-1].as_py()]))
"""


def test_what_the_hub_gave_once_is_read_again_offline(tmp_path):
    with fake_hub.serve(fake_hub.repositories()) as endpoint:
        online = run_python(READ, endpoint, tmp_path)
    offline = run_python(READ, endpoint, tmp_path, HF_HUB_OFFLINE="1")
    assert offline == online
    wikitext, ptb, c4 = (json.loads(line) for line in online)
    assert wikitext[0]["revision"] == "1" * 40
    assert wikitext[1:] == [4358, "row 4357"]
    assert ptb[0]["revision"] == "2" * 40
    assert ptb[1:] == [3761, "row 3760"]
    assert c4[0] == {
        "name": "c4-new",
        "repo": "allenai/c4",
        "revision": "3" * 40,
        "rows": 1100,
        "expected_rows": 1100,
        "partial": False,
    }
    assert c4[1:] == [1100, "document 1099"]


FETCH = """
import sys
from teq.verbs import prefetch
for names in sys.argv[1:] or ["wikitext2 c4 c4-new"]:
    print(prefetch.main(names.split()))
"""


def test_prefetch_makes_a_locked_mirror_and_mends_it(tmp_path, monkeypatch):
    folder, repos = tmp_path / "mirror", fake_hub.repositories()
    with fake_hub.serve(repos) as endpoint:
        said = run_python(FETCH, endpoint, tmp_path / "hf", TEQ_DATA=str(folder))
        assert said[0] == f"wikitext2: 4358 rows of Salesforce/wikitext@{'1' * 40}"
        assert said[-2:] == [f"2 of 2 files in {folder}: set TEQ_DATA={folder} to use them", "0"]
        monkeypatch.setenv("TEQ_DATA", str(folder))
        path = folder / "wikitext-2-raw-v1" / "test.parquet"
        assert json.loads((folder / mirror.LOCK).read_text())["wikitext-2-raw-v1/test"] == {
            "name": "wikitext2",
            "repo": "Salesforce/wikitext",
            "revision": "1" * 40,
            "rows": 4358,
            "sha256": file_digest(path),
        }
        assert corpora.provenance("wikitext2")["revision"] == "1" * 40
        assert corpora.provenance("c4")["rows"] == 45576
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(UserError, match="refused"):
            corpora.provenance("wikitext2")
        repos["allenai/c4"]["commit"] = "4" * 40
        said = run_python(FETCH, endpoint, tmp_path / "hf", TEQ_DATA=str(folder))
        assert (
            said[0] == f"wikitext2: 4358 rows of Salesforce/wikitext@{'1' * 40}"
        )  # the damaged file is made anew
        assert said[1] == f"c4: 45576 rows of allenai/c4@{'4' * 40}"
        assert corpora.provenance("wikitext2")["partial"] is False
        said = run_python(FETCH, endpoint, tmp_path / "hf", TEQ_DATA=str(folder))
        assert said[:2] == [f"wikitext2: {'1' * 40} is there already", f"c4: {'4' * 40} is there already"]


def test_prefetch_leaves_files_alone_that_it_did_not_fetch(write, unplugged, tmp_path, capsys):
    path = write("ptb_text_only/test", sentence=documents(5))
    before = path.read_bytes()
    assert prefetch.main(["ptb-new", "--into", str(path.parent.parent)]) == 1
    assert "is in no lock file, so it is not overwritten" in capsys.readouterr().err
    assert path.read_bytes() == before
    with pytest.raises(UserError, match="prefetch needs a folder: set TEQ_DATA"):
        prefetch.main(["ptb-new"])
    with pytest.raises(UserError, match="'ptb2' is unknown"):
        prefetch.main(["ptb2", "--into", str(tmp_path)])


def lock_entries(folder, name, begin):
    begin.wait()
    for i in range(30):
        prefetch._lock(folder, f"{name}/{i}", {"sha256": "0" * 64})


def test_prefetches_at_once_lose_no_entry_of_the_lock_file(tmp_path):
    fork = multiprocessing.get_context("fork")
    begin = fork.Barrier(2)
    both = [fork.Process(target=lock_entries, args=(tmp_path, name, begin)) for name in ("a", "b")]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    assert set(mirror.read_lock(tmp_path)) == {f"{name}/{i}" for name in ("a", "b") for i in range(30)}
    assert {file.name for file in tmp_path.iterdir()} <= {mirror.LOCK, f"{mirror.LOCK}.lock"}


# --- calibration


def settings(corpus, **values):
    return corpora.Calibration(corpus=corpus, **values)


def test_python_docs_windows_follow_one_another_and_cycle():
    tokenizer = byte_tokenizer(bos=True)
    stream = tokenizer(corpora.python_docs()).input_ids[:55_000]
    first = corpora.calibration(settings("python-docs"), tokenizer, 7, 128)
    assert first.flatten().tolist() == stream[: 7 * 128]
    third = corpora.calibration(settings("python-docs", seed=2), tokenizer, 7, 128)
    assert third.flatten().tolist() == stream[2 * 7 * 128 : 3 * 7 * 128]
    around = corpora.calibration(settings("python-docs", seed=1), tokenizer, 60, 800)
    assert around.flatten().tolist() == (stream * 2)[48_000:96_000]


@pytest.mark.parametrize("bos", [True, False])
def test_packed_documents_are_one_stream_in_a_seeded_order(write, bos):
    texts = documents(40)
    write("pile/train", text=texts)
    tokenizer = byte_tokenizer(bos)
    shuffled = list(texts)
    random.Random(3).shuffle(shuffled)
    stream = tokenizer("\n\n".join(shuffled)).input_ids
    windows = corpora.calibration(settings("pile-10k", seed=3), tokenizer, 9, 50)
    assert windows.shape == (9, 50)
    assert windows.flatten().tolist() == stream[:450]
    assert (windows == tokenizer.bos_token_id).sum() == int(bos)
    other = corpora.calibration(settings("pile-10k", seed=4), tokenizer, 9, 50)
    assert not torch.equal(windows, other)
    possible = len(stream) // 50
    assert len(corpora.calibration(settings("pile-10k"), tokenizer, possible, 50)) == possible
    with pytest.raises(
        UserError, match=f"the 40 documents of pile-10k give {possible} calibration windows of 50"
    ):
        corpora.calibration(settings("pile-10k"), tokenizer, possible + 1, 50)


def test_without_packing_short_documents_are_skipped(write):
    texts = [f"{i:03d}" * (20 if i % 4 == 0 else 2) for i in range(40)]
    write("pile/train", text=texts)
    tokenizer = byte_tokenizer(bos=True)
    found = corpora.calibration(settings("pile-10k", pack=False), tokenizer, 10, 32)
    assert (found[:, 0] == tokenizer.bos_token_id).all()
    starts = {tokenizer.decode(window[1:4]) for window in found}
    assert starts == {f"{i:03d}" for i in range(0, 40, 4)}
    with pytest.raises(
        UserError, match=r"give 10 calibration windows of 32 tokens, 11 are needed \(calib.pack=false"
    ):
        corpora.calibration(settings("pile-10k", pack=False), tokenizer, 11, 32)


def test_nobody_calibrates_on_a_test_set():
    with pytest.raises(UserError, match=r"calib.corpus='wikitext2' is not allowed.*python-docs, pile-10k"):
        settings("wikitext2")


# --- the real mirror


@pytest.mark.data
def test_the_real_sets_have_their_rows():
    if "TEQ_DATA" not in os.environ:
        pytest.skip("TEQ_DATA names no folder with the evaluation sets")
    whole = {}
    for name, source in SOURCES.items():
        if name == "c4" or not mirror.path_in(mirror.root(), source.file).is_file():
            continue
        found = corpora.find(name)
        table = found.table()
        assert len(table) == found.provenance()["rows"]
        hub.check_schema(table.schema, source, name)
        whole[name] = not found.partial
    assert whole["wikitext2"] and whole["ptb"] and whole["hellaswag"] and whole["lambada_openai"]
