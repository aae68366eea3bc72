"""Sets from the hub or its cache."""

import json

import fake_hub
import pytest
from conftest import run_python

from teq.data import texts as corpora
from teq.spec import UserError


@pytest.mark.parametrize("name", ["wikitext2", "c4-new", "hellaswag"])
def test_strict_offline_attempts_no_network_call(unplugged, name):
    with pytest.raises(
        UserError, match=f"{name} is neither.*HF_HUB_OFFLINE.*TEQ_DATA.*prefetch {name}.*hub be reached"
    ):
        corpora.provenance(name)


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


def settings(corpus, **values):
    return corpora.Calibration(corpus=corpus, **values)
