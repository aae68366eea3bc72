"""State of unfinished work: exact, whole after any interruption, and never what ends the work."""

import errno
import os

import pytest
import torch

from teq.files import disk
from teq.files.resume import BlockFiles, Journal

ENTRIES = [0.1, [1, 2.5e-300, True], 3.3333333333333335, "a text"]


@pytest.fixture
def full_disk(monkeypatch):
    """Files cannot be written until `full_disk()` is called."""
    original = os.fdopen, disk.save_tensors

    def no_space(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fdopen", no_space)
    monkeypatch.setattr(disk, "save_tensors", no_space)

    def freed():
        monkeypatch.setattr(os, "fdopen", original[0])
        monkeypatch.setattr(disk, "save_tensors", original[1])

    return freed


def test_a_journal_gives_back_exactly_what_was_appended(tmp_path):
    journal = Journal(tmp_path / "made" / "journal", "work")
    for entry in ENTRIES:
        journal.append(entry)
    assert Journal(tmp_path / "made" / "journal", "work").entries == ENTRIES


@pytest.mark.parametrize("torn", [b"[1, 2", b"[1, 2]", b"\0\0\0\0", b"\0\0\n", b"[1\n[2]\n"])
def test_a_torn_last_line_is_ignored_and_written_over(tmp_path, torn):
    file = tmp_path / "journal"
    first = Journal(file, "work")
    for entry in ENTRIES:
        first.append(entry)
    with file.open("ab") as stream:
        stream.write(torn)
    second = Journal(file, "work")
    assert second.entries == ENTRIES
    second.append(7)
    assert Journal(file, "work").entries == [*ENTRIES, 7]


def test_a_journal_on_a_full_disk_warns_once_and_writes_all_of_it_later(tmp_path, full_disk, caplog):
    journal = Journal(tmp_path / "journal", "scoring")
    for entry in ENTRIES[:3]:
        journal.append(entry)
    (warning,) = [line for line in caplog.messages if "cannot be saved" in line]
    assert "the state of scoring" in warning and "No space left" in warning
    full_disk()
    journal.append(ENTRIES[3])
    assert Journal(tmp_path / "journal", "scoring").entries == ENTRIES


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Journal(None, "work").append(1)
    blocks = BlockFiles(None, "work")
    blocks.write(0, {"w": torch.zeros(2)}, {})
    assert blocks.read(0) is None and list(tmp_path.iterdir()) == []


def block(index):
    return {"w": torch.full((2,), float(index))}, {"linear": {"error": 0.1 * index}}


def test_blocks_come_back_up_to_the_first_that_is_missing_or_damaged(tmp_path, caplog):
    first = BlockFiles(tmp_path / "blocks", "GPTQ")
    for index in range(4):
        first.write(index, *block(index))
    (tmp_path / "blocks" / "block-0002.safetensors").write_bytes(b"half a fi")
    second = BlockFiles(tmp_path / "blocks", "GPTQ")
    for index in range(2):
        tensors, report = second.read(index)
        assert torch.equal(tensors["w"], block(index)[0]["w"]) and report == block(index)[1]
    assert second.read(2) is None and "is damaged" in caplog.text
    assert second.read(3) is None  # it was measured on what the damaged one put out


def test_blocks_that_a_full_disk_refused_are_written_with_the_next(tmp_path, full_disk, caplog):
    blocks = BlockFiles(tmp_path, "GPTQ")
    for index in range(2):
        blocks.write(index, *block(index))
    assert sum("cannot be saved" in line for line in caplog.messages) == 1
    full_disk()
    blocks.write(2, *block(2))
    again = BlockFiles(tmp_path, "GPTQ")
    assert all(again.read(index) is not None for index in range(3))
