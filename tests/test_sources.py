"""The public sets by name."""

import os

import pytest

from teq.data import hub, mirror
from teq.data import texts as corpora
from teq.data.sources import SOURCES
from teq.spec import UserError


def test_unknown_names_and_folders(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="the set 'wikitext3' is unknown: choose one of wikitext2, ptb"):
        corpora.provenance("wikitext3")
    monkeypatch.setenv("TEQ_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="nowhere is not a folder"):
        corpora.provenance("wikitext2")


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
