"""What running processes use: known while they run, forgotten when they end."""

import errno
import multiprocessing
import os
import socket
import time

import pytest

from teq.files import disk, in_use


@pytest.fixture
def worker(tmp_path, start_process):
    """A process that registers entries of the cache `tmp_path` and lives on: `worker(*entries)`."""
    return lambda *entries: start_process(_work, tmp_path, entries)


def _work(root, ready, entries):
    for entry in entries:
        in_use.register(root, entry)
    ready.set()
    time.sleep(600)


def held(root):
    with in_use.unchanging(root):
        return in_use.held(root)


def notes(root):
    return list((root / in_use.FOLDER).glob("*-*-*"))


def test_what_a_process_uses_is_held_until_it_ends(tmp_path, worker):
    one, two = worker("weights/a", "weights/b"), worker("weights/b")
    assert held(tmp_path) == {"weights/a", "weights/b"}
    one.kill()
    one.join()
    assert held(tmp_path) == {"weights/b"} and len(notes(tmp_path)) == 1
    two.kill()
    two.join()
    assert held(tmp_path) == set() and notes(tmp_path) == []


def test_a_forked_process_has_a_note_of_its_own(tmp_path, worker):
    in_use.register(tmp_path, "weights/mine")
    child = worker("weights/its")
    assert held(tmp_path) == {"weights/mine", "weights/its"} and len(notes(tmp_path)) == 2
    child.kill()
    child.join()
    assert held(tmp_path) == {"weights/mine"}


def test_an_entry_is_noted_once_and_again_after_the_cache_was_deleted(tmp_path):
    in_use.register(tmp_path, "weights/a")
    in_use.register(tmp_path, "weights/a")
    (note,) = notes(tmp_path)
    assert note.read_text() == "weights/a\n"
    note.unlink()
    in_use.register(tmp_path, "weights/a")
    assert held(tmp_path) == {"weights/a"}


def test_a_new_process_deletes_what_ended_ones_left(tmp_path, worker):
    ended = worker("weights/a")
    ended.kill()
    ended.join()
    worker("weights/b")
    (note,) = notes(tmp_path)
    assert note.read_text() == "weights/b\n"


def test_another_machines_note_counts_for_a_week(tmp_path):
    in_use.register(tmp_path, "weights/mine")
    note = tmp_path / in_use.FOLDER / "other-host-12-abcd"
    note.write_text("weights/a\n")
    assert held(tmp_path) == {"weights/mine", "weights/a"}
    os.utime(note, (0, time.time() - disk.ABANDONED - 60))
    assert held(tmp_path) == {"weights/mine"} and not note.exists()


def test_without_locks_a_process_counts_as_long_as_its_number_is_taken(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(in_use.fcntl, "flock", none)
    ended = multiprocessing.get_context("fork").Process(target=int)
    ended.start()
    ended.join()
    in_use.register(tmp_path, "weights/mine")
    gone = tmp_path / in_use.FOLDER / f"{socket.gethostname()}-{ended.pid}-abcd"
    gone.write_text("weights/gone\n")
    assert held(tmp_path) == {"weights/mine"} and not gone.exists()


def test_a_cache_that_cannot_be_written_has_no_notes(tmp_path, read_only):
    folder, lock = read_only
    lock()
    in_use.register(folder, "weights/a")
    assert list(folder.iterdir()) == []
