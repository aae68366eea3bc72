"""From a configuration to its job: recipes, methods, what needs weights."""

import pytest
from record_factory import add_experiment

from teq import config
from teq.grid import Grid
from teq.models.checkpoint import Checkpoint
from teq.report import cells
from teq.report.match import RecordIndex
from teq.report.read import read
from teq.spec import UserError

NOTHING = RecordIndex(config.ROOT / "no-such-folder")


def test_act_order_methods_differ_from_gptq_in_that_alone():
    runs = {
        name: config.jobs([f"method={name}", "model=tiny-opt"])[0].run.quantizer.plain()
        for name in ("gptq", "gptq-ao", "teq+gptq-ao")
    }
    assert {key for key in runs["gptq"] if runs["gptq"][key] != runs["gptq-ao"][key]} == {"act_order"}
    assert runs["gptq-ao"] == runs["teq+gptq-ao"]
    assert runs["gptq-ao"]["static_groups"] is False


def test_orders_are_hashed_as_the_official_flags():
    flags = {}
    for order in ("natural", "act", "static", "group"):
        (job,) = config.jobs(["method=gptq", "model=tiny-opt", f"gptq.order={order}"])
        plain = job.run.quantizer.plain()
        flags[order] = plain["act_order"], plain["static_groups"], plain.get("group_aware")
    assert flags == {
        "natural": (False, False, None),
        "act": (True, False, None),
        "static": (True, True, None),
        "group": (False, False, True),
    }
    with pytest.raises(UserError, match=r"gptq\.order='desc' is not .* one of natural, act, static, group"):
        config.jobs(["method=gptq", "model=tiny-opt", "gptq.order=desc"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["method=teq", "evals=[counts]"],
            "method=teq needs weights: beside model.weights=none choose method=fp",
        ),
        (["method=fp", "evals=[ptb]"], r"evals=ptb needs weights: .* choose evals=\[counts\]"),
        (["model.weights=nothing"], "model.weights=nothing is not allowed: it must be null .* or none"),
    ],
)
def test_what_needs_weights_is_refused_without_them(overrides, message):
    with pytest.raises(UserError, match=message):
        config.jobs(["model=tiny-opt", "model.weights=none", *overrides])


def test_table_8_is_what_the_recipe_resolves_to():
    body = read("table8", (), NOTHING).body
    assert {value.verdict for value in body.cells.values()} == {cells.AS_STATED}
    special = {
        (row[0], column[0]): value.ours
        for (row, column), value in body.cells.items()
        if value.ours not in ("ones", 1e-3)
    }
    assert special == {
        ("opt-6.7b", "w4_g128"): "inv_sqrt",
        ("opt-13b", "w4"): "inv_sqrt",
        ("opt-13b", "w3_g128"): "inv_sqrt",
        ("bloom-3b", "w4"): "inv_sqrt",
        ("bloom-7b1", "w4"): "inv_sqrt",
        ("llama-7b", "w4"): 4e-4,
        ("llama-13b", "w4_g128"): 2e-4,
    }


def test_the_hours_on_real_data_train_one_grid_as_long_as_the_paper():
    trained = {
        job.run.transform.grid: (job.run.transform.steps, job.run.transform.lr, job.run.transform.parameter)
        for job in config.jobs(["experiments=smollm2", "method=teq"])
    }
    assert trained == {
        Grid(bits=4, group_size=-1): (1000, 1e-3, "clip"),
        Grid(bits=4, group_size=128): (100, 1e-2, "log"),
        Grid(bits=3, group_size=128): (100, 1e-2, "log"),
    }


def test_an_outline_is_a_checkpoint_of_its_own():
    real, outline = (
        config.jobs(["model=opt-6.7b", "method=fp", "evals=[counts]", f"model.weights={weights}"])[0].run
        for weights in ("null", "none")
    )
    assert isinstance(outline.model, Checkpoint)
    assert real.key() != outline.key()


def test_a_value_by_hand_and_the_same_value_from_the_recipe_are_one_run():
    by_recipe, by_hand = (
        config.jobs(["model=tiny-opt", *extra])[0].run.key()
        for extra in ([], ["train.lr=0.01", "train.steps=100", "init=ones", "recipe=quick"])
    )
    assert by_recipe == by_hand


def test_recipes_exceptions_are_the_papers_table_8():
    def of(model, *grid):
        (job,) = config.jobs([f"model={model}", "method=teq", *grid])
        return job.run.transform.init, job.run.transform.lr

    w4, g128 = ("bits=4", "group_size=-1"), ("bits=4", "group_size=128")
    assert of("opt-13b", *w4) == of("bloom-3b", *w4) == of("bloom-7b1", *w4) == ("inv_sqrt", 1e-3)
    assert of("opt-6.7b", *g128) == of("opt-13b", "bits=3", "group_size=128") == ("inv_sqrt", 1e-3)
    assert of("llama-7b", *w4) == ("ones", 4e-4) and of("llama-13b", *g128) == ("ones", 2e-4)
    assert of("opt-6.7b", *w4) == of("llama-7b", *g128) == ("ones", 1e-3)
    (job,) = config.jobs(["model=llama-7b", "method=teq", *w4, "train.lr=0.5"])
    assert job.run.transform.lr == 0.5  # the user's word is the last


def test_a_limit_by_task_gives_the_keys_of_plain_numbers():
    tasks = "evals=[hellaswag,piqa,winogrande,python-docs]"
    short = ["model=tiny-opt", "method=rtn", tasks, "recipe=hours"]

    def keys(limit):
        return {one.name: one.key() for one in config.jobs([*short, f"tasks.limit={limit}"])[0].run.evals}

    mixed = keys("{hellaswag: 5, winogrande: null, default: 7}")
    assert mixed["hellaswag"] == keys(5)["hellaswag"]
    assert mixed["piqa"] == keys(7)["piqa"]
    # all documents, though the recipe limits tasks
    assert mixed["winogrande"] == keys("{piqa: 7}")["winogrande"]
    assert mixed["python-docs"] == keys(5)["python-docs"]
    (found,) = config.jobs([*short, "tasks.limit={hellaswag: 5, winogrande: null, default: 7}"])
    assert [getattr(one, "limit", None) for one in found.run.evals] == [5, 7, None, 10]


def test_a_limit_by_text_gives_the_keys_of_plain_numbers():
    short = ["model=tiny-opt", "method=rtn", "evals=[wikitext2,ptb-new,c4-new,piqa]", "recipe=hours"]

    def keys(limit):
        return {one.name: one.key() for one in config.jobs([*short, f"ppl.limit={limit}"])[0].run.evals}

    mixed = keys("{c4-new: 64, wikitext2: null, default: 3}")
    assert mixed["c4-new"] == keys(64)["c4-new"] and mixed["ptb-new"] == keys(3)["ptb-new"]
    assert mixed["wikitext2"] == keys("{c4-new: 64}")["wikitext2"]  # all, though the recipe limits windows
    assert mixed["piqa"] == keys(3)["piqa"]
    with pytest.raises(UserError, match=r"ppl\.limit=wikitext is not allowed: did you mean wikitext2\?"):
        config.jobs([*short, "ppl.limit={wikitext: 3}"])


def test_an_experiment_may_limit_each_task(monkeypatch, tmp_path):
    text = """
hydra: {mode: MULTIRUN, sweeper: {params: {model: tiny-llama, method: "fp,rtn"}}}
evals: [hellaswag, piqa]
tasks: {limit: {hellaswag: 5}}
"""
    add_experiment(monkeypatch, tmp_path, "small", text)
    for job in config.jobs(["experiments=small"]):
        assert [one.limit for one in job.run.evals] == [5, None]


def test_a_limit_of_a_task_that_there_is_not_is_refused():
    short = ["model=tiny-opt", "method=rtn", "evals=[hellaswag]"]
    with pytest.raises(UserError) as refused:
        config.jobs([*short, "tasks.limit={helaswag: 5}"])
    (line,) = str(refused.value).splitlines()
    assert line.startswith(
        "tasks.limit=helaswag is not allowed: did you mean hellaswag? it must be one of def"
    )
    with pytest.raises(UserError, match=r"tasks\.limit=0 is not allowed"):
        config.jobs([*short, "tasks.limit={hellaswag: 0}"])
