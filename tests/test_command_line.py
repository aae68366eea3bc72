"""Command lines: what nothing reads is refused, every positive group size is an option."""

import re
import shutil
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore
from record_factory import add_experiment

import run as entry
from teq import config
from teq.__main__ import main
from teq.models import wheel
from teq.spec import UserError
from teq.verbs import run as cli

TINY = ["model=tiny-llama", "method=rtn", "evals=[python-docs]"]


@pytest.fixture(autouse=True)
def no_added_sizes(monkeypatch):
    """The options that another test added to Hydra's store are not there."""
    monkeypatch.setattr(ConfigStore.instance(), "repo", dict(ConfigStore.instance().repo))
    ConfigStore.instance().repo.pop("group_size", None)


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("+tasks.num_fewshot=5", "tasks.limit"),
        ("++tasks.num_fewshot=5", "tasks.limit"),
        ("+ppl.stride=512", "ppl.windows"),
        ("+train={stepz: 3}", "train"),
        ("+evaluation=ptb", "evals"),
        ("+eval=ptb", "evals"),
        ("+devise={}", "device"),
        ("+model.source.sed=3", "model.source.seed"),
    ],
)
def test_an_addition_that_nothing_reads_is_refused(override, nearest):
    with pytest.raises(UserError) as refused:
        config.jobs([*TINY, override])
    (line,) = str(refused.value).splitlines()
    assert line.startswith(f"{override} is read by no run: did you mean {nearest}")


@pytest.mark.parametrize("prefix", ["", "+", "++"])
@pytest.mark.parametrize(("name", "order"), [("act_order", "act"), ("static_groups", "static")])
def test_the_flags_of_gptqs_order_are_refused_with_the_order_that_replaces_them(prefix, name, order):
    with pytest.raises(UserError) as refused:
        config.jobs(["model=tiny-llama", "method=gptq", f"{prefix}gptq.{name}=true"])
    (line,) = str(refused.value).splitlines()
    assert line.startswith(f"gptq.{name} is no option any more: give gptq.order={order}")


@pytest.mark.parametrize("command", [entry.main, lambda argv: main(["plan", *argv])])
def test_every_such_addition_has_its_line_in_every_command(command, capsys):
    assert command([*TINY, "+tasks.num_fewshot=5", "+ppl.stride=512"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert sorted(line.split(" is read")[0] for line in lines) == [
        "error: +ppl.stride=512",
        "error: +tasks.num_fewshot=5",
    ]
    assert main(["report", "quickstart", "+ppl.stride=512"]) == 2
    assert "error: +ppl.stride=512 is read by no run" in capsys.readouterr().err


def test_additions_that_are_read_stay():
    key = config.jobs([*TINY, "ppl.limit=3"])[0].run.key()
    for same in ("++ppl.limit=3", "+ppl={limit: 3}"):
        assert config.jobs([*TINY, same, "+hydra.job.env_set.A=b"])[0].run.key() == key


@pytest.mark.parametrize("override", ["~train.lr", "~seed", "~model", "~evals", "~ppl"])
@pytest.mark.parametrize("sweep", [[], ["-m"]])
def test_what_every_run_reads_cannot_be_taken_away(override, sweep, capsys):
    assert entry.main([*sweep, *TINY, override]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {override} takes away what every run reads")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["train=5"], "train=5 is not allowed: set its values, such as train.steps"),
        (["tasks=null"], "tasks=None is not allowed: set its values, such as tasks.limit"),
        (["model=3"], "model=3 "),
        (["+group_size=96"], "+group_size=96 "),
        (
            ["group_size=-2"],
            "group_size=-2 is not allowed: it must be -1 (whole rows) or a whole number above 0",
        ),
        (["group_size=096"], "group_size=096 is not allowed: it must be -1"),
        (["-m", "group_size=96,x"], "group_size=x is not allowed: it must be -1"),
        (["hydra/launcher=pbs"], "hydra/launcher=pbs is not allowed: it must be one of basic"),
        (
            ["hydra/launcher=[joblib]"],
            "hydra/launcher=[joblib] is not allowed: hydra/launcher takes the name",
        ),
        (["grid=[w4]"], "grid=[w4] is not allowed: grid takes the name of one option"),
        (["bits=[4]"], "bits=[4] is not allowed: bits takes the name of one option"),
        (["+experiments=[seeds]"], "+experiments=[seeds] is not allowed: experiments takes the name"),
        (["-m", "recipe=quick,[hours]"], "recipe=quick,[hours] is not allowed: recipe takes the name"),
    ],
)
def test_bad_choices_are_one_line(argv, said, capsys):
    assert entry.main([*argv, *TINY[1:]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")


def test_a_number_without_a_file_is_a_group_size_like_those_with_one(tmp_path, monkeypatch):
    keys = [job.run.key() for job in config.jobs(["-m", *TINY, "group_size=96,128"])]
    ours = config.jobs([*TINY, "group_size=96"])[0].run
    assert ours.quantizer.grid.group_size == 96 and keys[0] == ours.key() and keys[0] != keys[1]
    # the same as if there were a file
    shutil.copytree(config.folder("conf"), tmp_path / "conf")
    (tmp_path / "conf" / "group_size" / "96.yaml").write_text("# @package _global_\ngroup_size: 96\n")
    ConfigStore.instance().repo.pop("group_size")
    monkeypatch.setenv("TEQ_ROOT", str(tmp_path))
    assert config.jobs([*TINY, "group_size=96"])[0].run.key() == keys[0]
    assert "group_size" not in ConfigStore.instance().repo


def test_group_sizes_of_an_experiment_file(tmp_path, monkeypatch):
    sweep = "{model: tiny-llama, method: rtn, group_size: \"'96','40'\"}"
    add_experiment(monkeypatch, tmp_path, "odd", f"hydra: {{mode: MULTIRUN, sweeper: {{params: {sweep}}}}}\n")
    assert [job.run.quantizer.grid.group_size for job in config.jobs(["experiments=odd"])] == [96, 40]


def test_help_says_that_any_number_is_a_group_size():
    assert re.search(r"group_size +-1, 16, .*512, any other number above 0\n", cli.help_text())


def test_every_group_and_value_has_one_sentence_of_help():
    sentences, named = config.help_sentences(), set(config.groups()) | set(config.values())
    assert set(sentences) == named
    assert all(re.fullmatch(r"\S[^\n]*[^.]\.", sentence) for sentence in sentences.values())
    text = cli.help_text()
    assert all(sentence in text for sentence in sentences.values())


def test_hydras_own_settings_say_where_jobs_run():
    pytest.importorskip(
        "hydra_plugins.hydra_joblib_launcher", reason="hydra-joblib-launcher is not installed"
    )
    joblib = [*TINY, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    assert [job.launcher for job in config.jobs(["-m", *joblib])] == ["joblib"]
    assert [job.launcher for job in config.jobs([*joblib, "hydra.mode=MULTIRUN"])] == ["joblib"]
    assert [job.launcher for job in config.jobs(joblib)] == ["basic"]  # Hydra runs one job where it is
    with pytest.raises(UserError, match=r"there is no option 'hydra\.launcher\.njobs'"):
        config.jobs(["-m", *TINY, "hydra/launcher=joblib", "hydra.launcher.njobs=2"])


def test_a_requirement_is_no_option_of_pip(monkeypatch, tmp_path):
    """pip takes what begins with a dash behind `--` for a requirement, and refuses it."""
    with pytest.raises(UserError, match=r"--help could not be downloaded .*Invalid requirement: '--help'"):
        wheel.fetch("--help", Path(tmp_path))


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("bits=4", "bits='4'"),
        ("bits=3,4", "bits='3','4'"),
        ("group_size=-1,128", "group_size='-1','128'"),
        ("bits='4'", "bits='4'"),
        ("train.steps=4", "train.steps=4"),
    ],
)
def test_integers_of_config_groups_are_quoted(word, expected):
    assert config.quoted([word]) == [expected]


def test_flags_may_stand_anywhere():
    assert config.quoted(["a=1", "-m", "b=2"]) == ["-m", "a=1", "b=2"]
