"""The kill campaign at tiny size, and that it would see what is lost."""

import json

import pytest

from benchmarks import kills

SWEEP = ["model=tiny-llama", "method=teq+gptq", "train.steps=20", "train.length=48", "gptq.samples=8"]
SWEEP += ["gptq.length=64", "ppl.limit=8", "ppl.context=64", "evals=[python-docs,lastword-python-docs]"]


def test_a_sweep_that_is_killed_in_every_way_ends_as_an_undisturbed_one(tmp_path):
    file = tmp_path / "kills.json"
    assert kills.main(["--kills", "3", "--seed", "3", "--json", str(file), *SWEEP]) == 0
    report = json.loads(file.read_text())
    assert sum(report["made"].values()) == 3 and report["problems"] == 0
    killed = [each for each in report["rounds"] if each["kills"]]
    assert killed and all(each["compared"] == 7 for each in killed)
    for each in killed:
        assert each["differing"] == [] == each["computed_twice"]
        # the same pieces, some of them begun more often: where there was no time to store them
        undisturbed = report["rounds"][0]["pieces"]
        assert {kind: n["pieces"] for kind, n in each["pieces"].items()} == {
            kind: n["begun"] for kind, n in undisturbed.items()
        }


@pytest.mark.parametrize(
    ("events", "twice"),
    [
        ([("begin", "a"), ("begin", "a"), ("stored", "a"), ("begin", "b")], []),
        ([("begin", "a"), ("stored", "a"), ("begin", "b"), ("begin", "a"), ("begin", "a")], ["a", "a"]),
    ],
)
def test_work_that_is_begun_after_it_was_stored_is_seen(events, twice):
    assert kills.computed_twice(json.dumps(event) for event in events) == twice
