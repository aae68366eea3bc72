"""Refusals of configurations that no run reads."""

import pytest
from record_factory import add_experiment

from teq import config
from teq.spec import UserError


def test_a_grid_is_one_name_for_bits_and_group_size():
    (named,) = config.jobs(["grid=w3_g128", "model=tiny-opt"])
    (spelled,) = config.jobs(["bits=3", "group_size=128", "model=tiny-opt"])
    assert named.run.key() == spelled.run.key()
    with pytest.raises(UserError, match=r"bits=.4. has no effect beside grid=w3_g128.*choose grid="):
        config.jobs(["grid=w3_g128", "bits=4"])


def test_an_experiment_with_an_unknown_key(monkeypatch, tmp_path):
    add_experiment(monkeypatch, tmp_path, "bad", "ppl: {contxt: 3}\nhydra: {mode: MULTIRUN}\n")
    with pytest.raises(UserError, match=r"experiments/bad.yaml sets 'ppl.contxt'.*did you mean ppl.context"):
        config.jobs(["experiments=bad"])


def test_unknown_key_in_an_experiment_file_is_named(tmp_path, monkeypatch):
    text = "train: {stepz: 3}\nhydra: {mode: MULTIRUN, sweeper: {params: {model: tiny-llama}}}\n"
    add_experiment(monkeypatch, tmp_path, "odd", text)
    with pytest.raises(
        UserError, match=r"experiments/odd\.yaml sets 'train\.stepz'.*did you mean train\.steps"
    ):
        config.jobs(["experiments=odd"])
