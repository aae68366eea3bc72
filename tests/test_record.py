"""Records: written once, healed when damaged, never unpacked without limit."""

import base64
import errno
import json
import pathlib
import zlib

import numpy as np
import pytest
from record_factory import made
from tiny_jobs import run

from teq import config, record
from teq.spec import UserError


@pytest.fixture
def job():
    (found,) = config.jobs(["model=tiny-opt", "method=rtn", "evals=[python-docs]"])
    return found


def written(folder, job, losses=(2.0, 2.1), **options):
    return made(folder, job, evals={"python-docs": np.array(losses)}, **options)


def other_result(data):
    data["stages"]["python-docs"]["digest"] = "1" * 16


@pytest.mark.parametrize("left", ["", "{", "[]", '{"schema": 1}'])
def test_a_damaged_record_is_written_anew(tmp_path, job, caplog, left):
    first = written(tmp_path, job)
    first.file.write_text(left)
    again = written(tmp_path, job)
    assert again.file == first.file and again.data == first.data
    assert record.read(first.file).data == first.data and "is left out" in caplog.text


def test_a_record_that_cannot_be_read_is_not_overwritten(tmp_path, job, monkeypatch):
    first = written(tmp_path, job)

    def fail(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "read_text", fail)
        patch.setattr(pathlib.Path, "read_bytes", fail)
        with pytest.raises(OSError, match="Input/output error"):
            written(tmp_path, job, created="2027-01-01")
    assert record.read(first.file).data["created"] == first.data["created"]


def test_the_same_results_are_one_record_and_others_another_which_is_said(tmp_path, job, caplog):
    first = written(tmp_path, job)
    assert written(tmp_path, job, created="2027-01-01").data["created"] == first.data["created"]
    assert "with other results" not in caplog.text
    second = written(tmp_path, job, change=other_result, created="2027-01-01")
    assert second.file != first.file and first.file.is_file()
    assert f"with other results than in {first.file.name}" in caplog.text
    keys = {name: stage["key"] for name, stage in first.data["stages"].items()}
    digests = dict.fromkeys(keys, "0" * 16)
    assert record.find(tmp_path, first.id, keys, digests).file == first.file
    assert (
        record.find(tmp_path, first.id, keys, {"python-docs": "1" * 16, "scales": None}).file == second.file
    )
    assert record.find(tmp_path, first.id, keys, {}).file == second.file  # the latest
    assert record.find(tmp_path, first.id, keys, {"python-docs": "2" * 16}) is None
    assert record.find(tmp_path, first.id, keys | {"weights": "other"}, {}) is None


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, job):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"the record .* cannot be written .*: free space .* TEQ_HOME"
    ) as caught:
        written(tmp_path / "file" / "records", job)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "array", [np.arange(6.0).reshape(2, 3), np.zeros((0, 3)), np.array(5), np.ones(3, bool)]
)
def test_an_array_comes_back_as_it_was_packed(array):
    back = record.unpack(json.loads(json.dumps(record.pack(array))))
    assert back.dtype == array.dtype and back.shape == array.shape and (back == array).all()


def packed(raw, dtype, shape):
    return {"dtype": dtype, "shape": shape, "data": base64.b64encode(zlib.compress(raw, 9)).decode()}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (packed(bytes(8), "<f8", [2**40]), "is not allowed"),  # more than a record may hold
        (packed(bytes(8), "<f8", [-1]), "is not allowed"),
        (packed(bytes(8), "|O", [1]), "is not allowed"),  # pointers
        (packed(bytes(8), "<f8", [2]), "other data than that"),
        (packed(bytes(16), "<f8", [1]), "other data than that"),
    ],
)
def test_arrays_that_cannot_be_right_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        record.unpack(given)


def test_a_bomb_is_refused_before_it_is_unpacked():
    import tracemalloc

    bomb = packed(bytes(2**28), "<f8", [1])  # 256 MiB in a few hundred kB
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="other data than that"):
            record.unpack(bomb)
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


def test_a_record_with_a_bomb_in_it_hides_no_other(tmp_path, job, caplog):
    bomb = packed(bytes(2**20), "<f8", [2])

    def armed(data):
        data["metrics"]["python-docs"]["arrays"]["window_loss"] = bomb
        other_result(data)

    first = written(tmp_path, job)
    armed_data = json.loads(first.file.read_text())
    armed(armed_data)
    (tmp_path / "armed.json").write_text(json.dumps(armed_data))
    assert [one.file for one in record.load(tmp_path)] == [first.file]
    assert "armed.json is left out" in caplog.text


def test_records_as_a_frame(own_home):
    for method in ("fp", "rtn"):
        run(own_home, f"method={method}")
    table = record.frame(record.load(own_home / "records"))
    assert list(table["method"]) == ["fp", "rtn"] and table["bits"].tolist()[1] == 3
    assert table["python-docs.ppl"].notna().all() and (table["seconds.python-docs"] > 0).all()


def test_broken_and_foreign_records_never_hide_the_others(own_home, caplog):
    finished = run(own_home, "method=fp")
    folder = finished.file.parent
    (folder / "a.json").write_text("{")
    (folder / "b.json").write_text(json.dumps({**finished.data, "schema": 0}))
    (folder / "c.json").write_text(json.dumps({"schema": record.SCHEMA}))
    assert [r.id for r in record.load(folder)] == [finished.id]
    assert all(name in caplog.text for name in ("a.json", "b.json", "c.json", "schema 0"))
