"""Sets from a mirror: rows, refusals, locks."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from conftest import documents

from teq.data import mirror
from teq.data import texts as corpora
from teq.files.digests import file_digest
from teq.spec import UserError


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
