"""`python -m teq prefetch`: a locked mirror."""

import json
import multiprocessing

import fake_hub
import pytest
from conftest import documents, run_python

from teq.data import mirror
from teq.data import texts as corpora
from teq.files.digests import file_digest
from teq.spec import UserError
from teq.verbs import prefetch

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


def settings(corpus, **values):
    return corpora.Calibration(corpus=corpus, **values)
