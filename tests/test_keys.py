"""Keys: what enters the name of a result, and what does not."""

import dataclasses

import pytest

from teq import config
from teq.models.checkpoint import Checkpoint, Folder
from teq.pipeline.settings import checks
from teq.spec import Settings, option

TINY = ["model=tiny-llama", "evals=[python-docs,lastword-python-docs]"]


def run(*overrides):
    (job,) = config.jobs([*TINY, *overrides])
    return job.run


def settings_of(value):
    """Every Settings object inside one, itself included."""
    if isinstance(value, Settings):
        yield value
        for field in dataclasses.fields(value):
            yield from settings_of(getattr(value, field.name))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from settings_of(part)


def with_a_new_option(value, given):
    """The same settings of classes that have one option more, omitted at False."""
    if isinstance(value, tuple):
        return tuple(with_a_new_option(part, given) for part in value)
    if not isinstance(value, Settings):
        return value
    fields = {f.name: with_a_new_option(getattr(value, f.name), given) for f in dataclasses.fields(value)}
    more = {"added": option(False, omitted=False), "__annotations__": {"added": bool}}
    namespace = {**more, "__post_init__": lambda _: None}  # types are those of the class before
    extended = dataclasses.dataclass(frozen=True, kw_only=True)(
        type(type(value).__name__, (type(value),), namespace)
    )
    return extended(**fields, added=given)


@pytest.mark.parametrize("method", ["fp", "rtn", "gptq", "teq+gptq", "awq", "smoothquant"])
def test_an_option_added_later_changes_no_key_of_a_run_without_it(method):
    now = run(f"method={method}")
    extended = with_a_new_option(now, False)
    assert {type(one).__name__ for one in settings_of(extended)} == {
        type(one).__name__ for one in settings_of(now)
    }
    for before, after in zip(settings_of(now), settings_of(extended), strict=True):
        assert after.key() == before.key(), type(before).__name__
        assert with_a_new_option(before, True).key() != before.key(), type(before).__name__


def test_the_name_of_a_method_is_no_part_of_a_run():
    named, switched = run("method=gptq-ao"), run("method=gptq", "gptq.order=act")
    assert named.method != switched.method and named.key() == switched.key()
    assert run("method=gptq").key() != named.key()


def test_the_words_of_a_message_are_in_no_key():
    before = run("method=rtn")
    arch = dataclasses.replace(before.model.arch, because="in other words", name="another")
    after = dataclasses.replace(before, model=dataclasses.replace(before.model, arch=arch))
    assert after.key() == before.key() and after.model.arch.plain() == before.model.arch.plain()


def test_the_order_of_evaluations_is_in_no_key():
    backwards = run("evals=[lastword-python-docs,python-docs]")
    assert [e.name for e in backwards.evals] == ["lastword-python-docs", "python-docs"]
    assert backwards.key() == run().key() != run("evals=[python-docs]").key()


def test_where_a_folder_lies_is_in_no_key_and_in_no_record():
    here, there = Folder(path="/one/place/model"), Folder(path="/another/model/")
    assert here.key() == there.key() and here.plain()["path"] == "model"
    assert Folder(path="/one/place/finetuned").key() != here.key()
    arch = run().model.arch
    found = [
        checks(dataclasses.replace(run(), model=Checkpoint(name="m", source=source, arch=arch)))[0]
        for source in (here, there)
    ]
    assert found[0].keys() != found[1].keys()  # each folder is looked at
