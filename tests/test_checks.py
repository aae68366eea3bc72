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


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["method=gptq-ao", "gptq.order=static"],
            "gptq.order=static has no effect beside method=gptq-ao, which sets it to act",
        ),
        (["method=teq+gptq-ao", "++gptq.order=group"], "gptq.order=group has no effect beside"),
        (["-m", "method=gptq,gptq-ao", "gptq.order=natural,act"], "gptq.order=natural has no effect"),
        (["method=teq", "init=awq", "awq.clip=true"], "awq.clip=true has no effect.*which sets it to false"),
    ],
)
def test_what_a_method_is_cannot_be_set_to_something_else(argv, message):
    with pytest.raises(UserError, match=message) as refused:
        config.jobs(["model=tiny-llama", *argv])
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    "argv",
    [
        ["method=gptq-ao", "gptq.order=act"],
        ["method=gptq-ao", "gptq.damping=0.01"],
        ["method=teq", "init=awq", "awq.clip=false"],
        ["method=teq", "awq.clip=true"],  # nothing of AWQ is read
    ],
)
def test_what_a_method_is_may_be_said_again(argv):
    """As in a sweep of several methods."""
    plain = [word for word in argv if word.startswith(("method", "init"))]
    said, plain = (config.jobs(["model=tiny-llama", *words])[0].run.key() for words in (argv, plain))
    assert said == plain


@pytest.mark.parametrize("quantizer", ["gptq", "signround"])
def test_the_command_line_comes_before_a_value_of_the_methods_file(quantizer):
    method = f"method=awq+{quantizer}"
    plain, same, clipped = (
        config.jobs(["model=tiny-llama", method, *more])[0].run
        for more in ([], ["awq.clip=false"], ["awq.clip=true"])
    )
    assert plain.transform.clip is False and clipped.transform.clip is True
    assert plain.key() == same.key() != clipped.key()
    assert config.jobs(["model=tiny-llama", "method=awq"])[0].run.transform.clip is True


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
