"""Tasks through lm-eval: its own numbers, on the documents that the settings draw; and the embedded cloze."""

import functools
import hashlib
import math
import os
import pathlib
import re

import numpy as np
import pytest

from teq import config
from teq.data import texts as corpora
from teq.device.runtime import Runtime
from teq.evaluate import lastword, tasks
from teq.evaluate.lastword import LastWord
from teq.evaluate.tasks import Task
from teq.pipeline import run as pipeline
from teq.pipeline.store import Store
from teq.spec import UserError

NOUNS = ["cat", "dog", "river", "stone", "window", "garden"]


@pytest.fixture
def four_sets(write):
    """A mirror of twelve documents of each task."""
    some = [(NOUNS[i % 6], NOUNS[(i * i + 1) % 6], i) for i in range(12)]
    write("lambada_openai/test", text=[f"the {a} saw the {b} and then the {a}" for a, b, _ in some])
    write(
        "winogrande_xl/validation",
        sentence=[f"the {a} is near the {b} because _ is number {i}" for a, b, i in some],
        option1=[a for a, _, _ in some],
        option2=[b for _, b, _ in some],
        answer=[str(1 + i % 2) for *_, i in some],
    )
    write(
        "piqa/validation",
        goal=[f"move the {a}" for a, *_ in some],
        sol1=[f"push it to the {b}" for _, b, _ in some],
        sol2=["sing"] * 12,
        label=[i % 2 for *_, i in some],
    )
    write(
        "hellaswag/validation",
        activity_label=["Walking"] * 12,
        ctx_a=[f"A {a} walks." for a, *_ in some],
        ctx_b=[f"the {b}" for _, b, _ in some],
        endings=[[f"sees {NOUNS[(i + k) % 6]} number {k}." for k in range(2 + i % 3)] for *_, i in some],
        label=[str(i % 2) for *_, i in some],
    )


def folder(name):
    """Where lm-eval keeps its file of the task."""
    import lm_eval.tasks

    return str(pathlib.Path(lm_eval.tasks.__file__).parent / tasks.FOLDERS[name])


def stock(lm, name, samples=None, model=None):
    """What lm-eval itself says with its own model class, on the same documents (all if not given)."""
    tasks.import_lm_eval()
    import lm_eval.tasks
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=folder(name))
    split = corpora.source(name).split
    documents = functools.partial(tasks._split, split, name)
    task = {"task": name, "custom_dataset": documents, "training_split": None}
    found = simple_evaluate(
        (model or HFLM)(lm.model, tokenizer=lm.tokenizer, batch_size=1),
        tasks=[{"group": "all", "task": [task]}],
        task_manager=manager,
        num_fewshot=0,
        bootstrap_iters=10,
        samples=None if samples is None else {name: samples},
    )
    return found["results"][name], sorted(found["samples"][name], key=lambda sample: sample["doc_id"])


@pytest.mark.parametrize("name", list(tasks.FOLDERS))
def test_values_are_those_of_lm_eval(four_sets, tiny, name):
    lm = tiny("opt")
    metric = Task(task=name).measure(lm, Runtime(batch_size=4))
    results, samples = stock(lm, name)
    for value in ("acc", "acc_norm"):
        assert (value in metric.values) == (f"{value},none" in results)
        if value in metric.values:
            assert metric.values[value] == results[f"{value},none"]
            assert metric.values[f"{value}_stderr"] == pytest.approx(
                results[f"{value}_stderr,none"], rel=1e-9
            )
    assert metric.arrays["correct"].tolist() == [sample["acc"] for sample in samples]
    assert metric.arrays["document"].tolist() == list(range(12))
    for row, sample in zip(metric.arrays["loglikelihood"], samples, strict=True):
        expected = [answer[0] for answer in sample["filtered_resps"]]
        assert row[: len(expected)].tolist() == pytest.approx(expected, abs=5e-4)
        assert np.isnan(row[len(expected) :]).all()
    assert metric.info["task_version"] == version(name)
    assert metric.info["partial"] is True
    assert (metric.info["documents"], metric.info["available_documents"]) == (12, 12)


def version(name):
    """The version in lm-eval's own file of the task."""
    import lm_eval.tasks

    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=folder(name))
    return manager.task_index[name].cfg["metadata"]["version"]


def test_ragged_choices_keep_their_places(four_sets, tiny):
    metric = Task(task="hellaswag").measure(tiny("opt"), Runtime())
    choices = (~np.isnan(metric.arrays["loglikelihood"])).sum(axis=1)
    assert choices.tolist() == [2 + i % 3 for i in range(12)]


def test_a_limit_draws_documents_that_a_larger_one_draws_too(four_sets, tiny):
    lm = tiny("opt")
    whole = Task(task="piqa").measure(lm, Runtime())
    few = Task(task="piqa", limit=5).measure(lm, Runtime())
    drawn = few.arrays["document"]
    assert len(drawn) == 5
    assert drawn.tolist() != list(range(5))
    assert few.arrays["loglikelihood"] == pytest.approx(whole.arrays["loglikelihood"][drawn], abs=1e-4)
    assert few.arrays["correct"].tolist() == whole.arrays["correct"][drawn].tolist()
    assert few.values["acc"] == pytest.approx(few.arrays["correct"].mean())
    assert few.info["documents_sha256"] == hashlib.sha256(drawn.astype("<i8").tobytes()).hexdigest()
    assert (
        set(tasks.sample_documents(12, 3, 0)) < set(tasks.sample_documents(12, 5, 0)) == set(drawn.tolist())
    )
    assert tasks.sample_documents(12, 5, 1) != tasks.sample_documents(12, 5, 0)
    assert tasks.sample_documents(12, None, 0) == tasks.sample_documents(12, 99, 0) == list(range(12))


def test_one_document_has_no_standard_error(four_sets, tiny):
    metric = Task(task="piqa", limit=1).measure(tiny("opt"), Runtime())
    assert set(metric.values) == {"acc", "acc_norm"}


def test_the_tokenizers_own_bos_is_recorded(four_sets, tiny):
    found = {
        family: Task(task="piqa", limit=2).measure(tiny(family), Runtime()) for family in ("opt", "bloom")
    }
    assert found["opt"].info["bos"] == "<s>"
    assert found["bloom"].info["bos"] is None


def test_the_harness_is_in_the_key_where_it_is_not_todays(four_sets):
    def key(*given):
        return config.jobs(["model=tiny-opt", "evals=[piqa]", *given])[0].run.key()

    today = key()
    assert key("tasks.bos=auto", "tasks.pair=joint", "tasks.chat_template=false") == today
    others = [key("tasks.bos=false"), key("tasks.pair=separate"), key("tasks.chat_template=true")]
    assert len({today, *others}) == 4
    (job,) = config.jobs(["model=opt-6.7b", "evals=[piqa]", "tasks.bos=auto"])
    assert job.run.evals[0].bos == "auto"  # by hand, though the recipe says false
    with pytest.raises(UserError, match=r"tasks\.bos='maybe' is not allowed"):
        config.jobs(["model=tiny-opt", "evals=[piqa]", "tasks.bos=maybe"])


def test_without_bos_scores_are_those_of_lm_eval_without(four_sets, tiny):
    from lm_eval.models.huggingface import HFLM

    lm = tiny("opt")
    plain, without = (
        Task(task="piqa").measure(lm, Runtime()),
        Task(task="piqa", bos=False).measure(lm, Runtime()),
    )
    assert (plain.info["bos"], without.info["bos"]) == ("<s>", None)
    assert "pair" not in without.info
    assert Task(task="piqa", pair="separate").measure(lm, Runtime()).info["pair"] == "separate"
    old = functools.partial(HFLM, add_bos_token=False)
    _, samples = stock(lm, "piqa", model=old)
    expected = [answer[0] for sample in samples for answer in sample["filtered_resps"]]
    assert without.arrays["loglikelihood"].ravel().tolist() == pytest.approx(expected, abs=5e-4)
    assert plain.arrays["loglikelihood"].ravel().tolist() != pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("name", ["piqa", "lastword-python-docs"])
def test_what_a_tokenizer_cannot_do_is_said_before_any_work(four_sets, own_home, name):
    for setting, said in (("bos", "adds no BOS token"), ("chat_template", "has no template")):
        (job,) = config.jobs(["model=tiny-bloom", f"evals=[{name}]", f"tasks.{setting}=true"])
        with pytest.raises(UserError, match=rf"tasks\.{setting}=true is not possible: .*{said}"):
            pipeline.run(job.run, Store(own_home / "store"), own_home, Runtime(), None)


def test_documents_longer_than_the_context_are_cut_and_counted(write, tiny):
    texts = ["a short one", "x" * 3000 + " and then one", "another short one"]
    write("lambada_openai/test", text=texts)
    lm = tiny("opt")
    metric = Task(task="lambada_openai").measure(lm, Runtime())
    assert metric.info["truncated"] == 1
    _, samples = stock(lm, "lambada_openai")
    expected = [sample["filtered_resps"][0][0] for sample in samples]
    assert metric.arrays["loglikelihood"][:, 0].tolist() == pytest.approx(expected, abs=5e-4)


def test_the_batch_size_is_in_no_key(four_sets):
    one, other = (
        config.jobs(["model=tiny-opt", "evals=[piqa]", f"tasks.batch_size={size}", "tasks.limit=5"])[0]
        for size in (1, 16)
    )
    assert one.run.key() == other.run.key()
    assert (one.options.batch_size, other.options.batch_size) == (1, 16)
    (more,) = config.jobs(["model=tiny-opt", "evals=[piqa]", "tasks.limit=6"])
    assert more.run.key() != one.run.key()
    assert one.run.evals[0].provenance()["lm_eval"] == tasks.metadata.version("lm_eval")


def test_bad_settings_are_named():
    with pytest.raises(UserError, match=r"tasks\.limit=0 is not allowed"):
        config.jobs(["model=tiny-opt", "evals=[piqa]", "tasks.limit=0"])
    with pytest.raises(
        UserError, match=r"tasks\.task='boolq' is not allowed: it must be one of hellaswag, winogrande"
    ):
        Task(task="boolq")


def test_an_interrupted_evaluation_keeps_the_tasks_that_were_finished(four_sets, own_home, monkeypatch):
    (job,) = config.jobs(["model=tiny-opt", "method=fp", "evals=[piqa,winogrande]"])

    def stop(self, lm, runtime):
        if self.task == "winogrande":
            raise KeyboardInterrupt
        return measure(self, lm, runtime)

    measure = Task.measure
    monkeypatch.setattr(Task, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(job.run, Store(own_home / "store"), own_home, Runtime(), None)
    monkeypatch.setattr(Task, "measure", measure)
    finished = pipeline.run(job.run, Store(own_home / "store"), own_home, Runtime(), None)
    stages = finished.data["stages"]
    assert (stages["piqa"]["cached"], stages["winogrande"]["cached"]) == (True, False)
    assert finished.array("winogrande", "correct").shape == (12,)


# --- lastword-python-docs


def test_lastword_items_are_passages_that_name_their_last_word():
    items = lastword.items()
    assert len(items) == len(set(items)) == lastword.ITEMS >= 300
    text = corpora.python_docs()
    calibration = " ".join(text[: lastword.START].split())
    evaluation = " ".join(text[lastword.START :].split())
    for context, word in items:
        pieces = re.findall(r"\w+|[^\w\s]", context)
        assert lastword.SHORTEST <= len(context.split(" ")) <= len(pieces) <= lastword.LONGEST
        assert word in pieces
        assert f"{context} {word}" in evaluation
        assert context not in calibration


def test_lastword_measures_greedy_last_words(tiny):
    lm = tiny("llama")
    metric = LastWord().measure(lm, Runtime())
    assert metric.arrays["correct"].shape == (lastword.ITEMS,)
    assert metric.values["acc"] == metric.arrays["correct"].mean()
    context, word = lastword.items()[7]
    before = len(lm.tokenizer(context).input_ids)
    tokens = lm.tokenizer(f"{context} {word}", return_tensors="pt").input_ids
    logits = lm.model(tokens).logits[0, before - 1 : -1].log_softmax(-1)
    expected = logits.gather(1, tokens[0, before:, None]).sum().item()
    assert metric.arrays["loglikelihood"][7, 0] == pytest.approx(expected, abs=5e-4)
    assert math.isfinite(metric.values["acc_stderr"])
    assert metric.info["name"] == "python-docs"


# --- the real documents


@pytest.mark.data
@pytest.mark.parametrize("name", list(tasks.FOLDERS))
def test_real_documents_score_as_stock(tiny, family, name):
    if "TEQ_DATA" not in os.environ:
        pytest.skip("TEQ_DATA names no folder with the evaluation sets")
    lm = tiny(family)
    metric = Task(task=name, limit=4).measure(lm, Runtime(batch_size=3))
    assert metric.info["available_documents"] == corpora.source(name).rows
    values, samples = stock(lm, name, metric.arrays["document"].tolist())
    assert metric.values["acc"] == pytest.approx(values["acc,none"])
    for ours, theirs in zip(metric.arrays["loglikelihood"], samples, strict=True):
        expected = [answer[0] for answer in theirs["filtered_resps"]]
        assert ours[: len(expected)] == pytest.approx(expected, abs=5e-4)
