"""Digests kept on disk: a file is read once, and never taken for one that it is not."""

import hashlib
import json
import multiprocessing
import os
import time

import pytest

from teq.files import digests, disk
from teq.files.digests import file_digest

SIZE = digests.KEPT


@pytest.fixture
def cache(tmp_path):
    """The folder with a file for each digest."""
    return tmp_path / "user" / "digests"


@pytest.fixture
def clock(monkeypatch):
    """Seconds to be added to the time: a file that is old enough need not be waited for."""
    ahead = [0.0]
    original = time.time
    monkeypatch.setattr(digests.time, "time", lambda: original() + ahead[0])
    return ahead


def forget():
    """As another process begins."""
    digests._digests.clear()


@pytest.fixture
def reads(monkeypatch):
    """The files that were read for a digest, one after another."""
    found = []
    original = disk.sha256
    monkeypatch.setattr(digests.disk, "sha256", lambda file: (found.append(file.name), original(file))[1])
    return found


def test_a_large_file_is_read_once_for_all_processes(tmp_path, clock, reads, cache):
    file = tmp_path / "weights"
    file.write_bytes(bytes(SIZE))
    clock[0] = 60
    first = file_digest(file)
    assert first == hashlib.sha256(bytes(SIZE)).hexdigest() and file_digest(file) == first
    forget()
    assert file_digest(file) == first and reads == ["weights"] and len(list(cache.iterdir())) == 1


def test_small_files_are_remembered_by_the_process_alone(tmp_path, clock, reads, cache):
    (tmp_path / "config").write_bytes(b"{}")
    clock[0] = 60
    assert file_digest(tmp_path / "config") == file_digest(tmp_path / "config")
    assert reads == ["config"] and not cache.exists()


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path, clock, reads, cache):
    """Within the coarsest time stamp it may change again without a trace, of the same size."""
    file = tmp_path / "weights"
    file.write_bytes(bytes(SIZE))
    clock[0] = 1
    file_digest(file)
    assert not cache.exists()
    state = file.stat()
    with file.open("r+b") as stream:
        stream.write(b"x")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert file_digest(file) == hashlib.sha256(file.read_bytes()).hexdigest() and len(reads) == 2


@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_an_edit_that_keeps_size_and_time_is_found(tmp_path, clock, how):
    file = tmp_path / "weights"
    file.write_bytes(bytes(SIZE))
    clock[0] = 60
    before, state = file_digest(file), file.stat()
    if how == "in place":
        with file.open("r+b") as stream:
            stream.write(b"x")
    else:
        (tmp_path / "new").write_bytes(b"x" + bytes(SIZE - 1))
        (tmp_path / "new").replace(file)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert file.stat().st_mtime_ns == state.st_mtime_ns and file.stat().st_size == state.st_size
    for _ in range(2):
        assert file_digest(file) == hashlib.sha256(file.read_bytes()).hexdigest() != before
        forget()


@pytest.mark.parametrize("left", ["", "{}", "[]", '{"state": null}', "garbage"])
def test_a_damaged_entry_is_written_anew(tmp_path, clock, reads, cache, left):
    file = tmp_path / "weights"
    file.write_bytes(bytes(SIZE))
    clock[0] = 60
    first = file_digest(file)
    (entry,) = cache.iterdir()
    entry.write_text(left)
    forget()
    assert file_digest(file) == first and len(reads) == 2
    assert json.loads(entry.read_text())["sha256"] == first


def test_a_digest_that_is_none_is_not_believed(tmp_path, clock, cache):
    file = tmp_path / "weights"
    file.write_bytes(bytes(SIZE))
    clock[0] = 60
    first = file_digest(file)
    (entry,) = cache.iterdir()
    for wrong in ("", "abc", 7, None):
        entry.write_text(json.dumps(json.loads(entry.read_text()) | {"sha256": wrong}))
        forget()
        assert file_digest(file) == first


def test_a_file_that_changes_while_it_is_read_is_not_remembered(tmp_path, clock, monkeypatch, cache):
    file = tmp_path / "weights"
    file.write_bytes(bytes(SIZE))
    clock[0] = 60
    original = disk.sha256

    def changing(path):
        found = original(path)
        path.write_bytes(b"x" * SIZE)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(digests.disk, "sha256", changing)
        file_digest(file)
    assert file_digest(file) == hashlib.sha256(b"x" * SIZE).hexdigest()


def test_a_cache_that_cannot_be_written_costs_the_reading_alone(tmp_path, clock, reads):
    (tmp_path / "user").write_text("")
    file = tmp_path / "weights"
    file.write_bytes(bytes(SIZE))
    clock[0] = 60
    first = file_digest(file)
    forget()
    assert file_digest(file) == first and len(reads) == 2


def digest_all(folder, out):
    found = {file.name: file_digest(file) for file in sorted(folder.iterdir())}
    out.put(found)


def test_processes_at_once_agree_and_leave_whole_entries(tmp_path, clock, cache):
    folder = tmp_path / "files"
    folder.mkdir()
    for i in range(6):
        (folder / str(i)).write_bytes(bytes([i]) * SIZE)
    clock[0] = 60
    fork = multiprocessing.get_context("fork")
    out = fork.Queue()
    processes = [fork.Process(target=digest_all, args=(folder, out)) for _ in range(3)]
    for process in processes:
        process.start()
    answers = [out.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    expected = {str(i): hashlib.sha256(bytes([i]) * SIZE).hexdigest() for i in range(6)}
    assert answers == [expected] * 3
    entries = [json.loads(file.read_text()) for file in cache.iterdir()]
    assert sorted(entry["sha256"] for entry in entries) == sorted(expected.values())


def test_what_takes_a_while_is_said_in_one_line_and_once(tmp_path, clock, monkeypatch, caplog):
    monkeypatch.setattr(digests, "LARGE", SIZE)
    caplog.set_level("INFO", "teq.files.digests")
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(SIZE))
    clock[0] = 60
    for _ in range(2):
        assert set(digests.file_digests(tmp_path, [tmp_path / "a", tmp_path / "b"])) == {"a", "b"}
        forget()
    assert caplog.text.count(f"GB of {tmp_path} for its digest, once") == 1
