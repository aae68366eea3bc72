"""Files: what is seen is whole, has the umask's permissions, and no two processes take one name."""

import errno
import multiprocessing
import os
import socket
import stat
import time

import pytest

from teq.files import disk


@pytest.fixture
def mask():
    """Set the process's umask: `mask(0o027)`."""
    before = disk.umask()
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("value", [0o002, 0o022, 0o077])
def test_what_is_written_has_the_permissions_that_the_umask_leaves(tmp_path, mask, value):
    mask(value)
    assert disk.umask() == value and disk.umask() == value
    disk.write_text(tmp_path / "new" / "file", "text")
    (tmp_path / "private").touch(0o600)
    disk.open_to_all(tmp_path / "private")
    with disk.locked(tmp_path / "lock"):
        pass
    for name in ("new/file", "private", "lock"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~value, name


def test_a_failed_write_leaves_the_file_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "file"
    disk.write_text(file, "before")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        disk.write_text(file, "after")
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]


def test_no_name_beside_a_file_is_given_twice(tmp_path):
    """Not even to equal process numbers on machines of one name, as containers have them."""
    names = {disk.unique_beside(tmp_path / "file").name for _ in range(200)}
    assert len(names) == 200 and all(name.startswith("file.") and name.endswith(".part") for name in names)


def count_up(folder):
    for _ in range(100):
        with disk.locked(folder / "lock"):
            number = int((folder / "number").read_text())
            (folder / "number").write_text(str(number + 1))


def test_a_lock_is_one_processs(tmp_path):
    (tmp_path / "number").write_text("0")
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=count_up, args=(tmp_path,)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    assert (tmp_path / "number").read_text() == "200"


def test_whether_a_folder_can_be_written(tmp_path, read_only):
    folder, lock = read_only
    assert disk.writable(tmp_path) and disk.writable(tmp_path / "a" / "b") and disk.writable(folder)
    lock()
    assert not disk.writable(folder) and not disk.writable(folder / "a" / "b")
    (tmp_path / "file").touch()
    assert not disk.writable(tmp_path / "file" / "a")


def test_a_folder_is_abandoned_when_its_process_ended_or_after_a_week(tmp_path):
    mine = disk.making_beside(tmp_path / "a-name.with-dots")
    ended = multiprocessing.get_context("fork").Process(target=int)
    ended.start()
    ended.join()
    host = socket.gethostname()
    made = {
        mine: False,
        tmp_path / f"x.making-{host}-{ended.pid}-1": True,
        tmp_path / "x.making-other-host-1-1": False,
        tmp_path / "x.making-abc_123": False,
    }
    for folder, abandoned in made.items():
        folder.mkdir()
        assert disk.abandoned(folder) == abandoned, folder
        os.utime(folder, (0, time.time() - 8 * 24 * 3600))
        assert disk.abandoned(folder), folder
