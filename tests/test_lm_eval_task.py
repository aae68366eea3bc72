"""Any task of lm-eval: stock lm-eval's numbers, contents in the key, one line where it cannot be loaded."""

import json
import pathlib

import datasets
import lm_eval.tasks
import numpy as np
import pytest
import yaml
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM

import run as entry
from teq import config, models
from teq.device.runtime import Runtime
from teq.evaluate import tasks
from teq.evaluate.lm_eval_task import HUB, LmEvalTask
from teq.pipeline import run as pipeline
from teq.pipeline.store import Store
from teq.spec import UserError

NOUNS = ["cat", "dog", "river", "stone", "window", "garden", "lamp"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "Question: what is near the {{near}}?\nAnswer:",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{label}}",
    "training_split": "train",
    "fewshot_split": "train",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
ANSWER = {
    "output_type": "generate_until",
    "doc_to_text": "The {{near}} is near the",
    "doc_to_target": "{{said}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "filter_list": [
        {"name": "whole", "filter": [{"function": "take_first"}]},
        {
            "name": "begin",
            "filter": [{"function": "regex", "regex_pattern": "^(.)"}, {"function": "take_first"}],
        },
    ],
}
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{near}} and {{choices[0]}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Task files on local documents: two multiple-choice tasks in a group, generation, whole texts."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return written(tmp_path / "mine")


def written(place, version=1, said=lambda i: "x", near=NOUNS):
    """Write the task files and their documents."""
    place.mkdir()
    for split, count in (("train", 5), ("test", 11)):
        rows = (
            {
                "near": near[i % 7],
                "choices": [NOUNS[(i + k) % 7] for k in range(2 + i % 2)],
                "label": i % 2,
                "said": said(i),
            }
            for i in range(count)
        )
        (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in (("choice", CHOICE), ("other", CHOICE), ("answer", ANSWER), ("rolling", ROLLING)):
        files = {split: str(place / f"{split}.jsonl") for split in ("train", "test")}
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
        content = {"task": f"tiny_{name}", **data, **task, "metadata": {"version": version}}
        (place / f"{name}.yaml").write_text(yaml.safe_dump(content))
    mean = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    group = {"group": "tiny_both", "task": ["tiny_choice", "tiny_other"], "aggregate_metric_list": mean}
    (place / "both.yaml").write_text(yaml.safe_dump(group))
    return str(place)


def stock(lm, name, folder, shots=None, chat=False, documents=None):
    """What lm-eval itself says with its own model class."""
    tasks.import_lm_eval()
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=folder)
    found = simple_evaluate(
        HFLM(lm.model, tokenizer=lm.tokenizer, batch_size=1),
        tasks=[name],
        task_manager=manager,
        num_fewshot=shots,
        bootstrap_iters=10,
        samples=documents and {name: documents},
        apply_chat_template=chat,
    )
    return found["results"], {
        each: sorted(part, key=lambda s: s["doc_id"]) for each, part in found["samples"].items()
    }


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("shots", [None, 2])
def test_choices_after_shots_are_those_of_lm_eval(folder, tiny, monkeypatch, shots, chat):
    lm = tiny("llama")
    monkeypatch.setattr(lm.tokenizer, "chat_template", TEMPLATE)
    task = LmEvalTask(task="tiny_choice", num_fewshot=shots, chat_template=chat, include_path=folder)
    metric = task.measure(lm, Runtime(batch_size=4))
    results, samples = stock(lm, "tiny_choice", folder, shots, chat)
    expected = results["tiny_choice"]
    for name in ("acc", "acc_norm"):
        assert metric.values[name] == expected[f"{name},none"]
        assert metric.values[f"{name}_stderr"] == pytest.approx(expected[f"{name}_stderr,none"], rel=1e-9)
    assert metric.arrays["correct"].tolist() == [sample["acc"] for sample in samples["tiny_choice"]]
    for row, sample in zip(metric.arrays["loglikelihood"], samples["tiny_choice"], strict=True):
        wanted = [answer[0] for answer in sample["filtered_resps"]]
        assert row[: len(wanted)].tolist() == pytest.approx(wanted, abs=5e-4)
    first = samples["tiny_choice"][0]["arguments"][0][0]
    assert first.count("Question") == 1 + (shots or 0) and first.count("<user>") == chat * (1 + (shots or 0))
    assert (metric.info["task_version"], metric.info["num_fewshot"]) == (1, shots or 0)
    assert metric.info.get("chat_template", False) is chat


def test_generated_answers_are_those_of_lm_eval(folder, tiny, tmp_path):
    lm = tiny("opt")
    _, samples = stock(lm, "tiny_answer", folder)
    texts = {sample["doc_id"]: sample["resps"][0][0] for sample in samples["tiny_answer"]}
    true = written(tmp_path / "true", said=lambda i: texts[i] if i % 3 else "nothing")
    metric = LmEvalTask(task="tiny_answer", include_path=true).measure(lm, Runtime(batch_size=4))
    results, _ = stock(lm, "tiny_answer", true)
    for name in ("exact_match,whole", "exact_match,begin"):
        assert metric.values[name] == results["tiny_answer"][name]
    assert metric.arrays["exact_match,whole"].tolist() == [int(i % 3 > 0) for i in range(11)]
    assert metric.values["exact_match_stderr,whole"] == pytest.approx(
        results["tiny_answer"]["exact_match_stderr,whole"], rel=1e-9
    )
    assert "loglikelihood" not in metric.arrays


def test_whole_texts_are_scored_as_lm_eval_does(folder, tiny):
    lm = tiny("bloom")
    metric = LmEvalTask(task="tiny_rolling", include_path=folder).measure(lm, Runtime(batch_size=4))
    results, samples = stock(lm, "tiny_rolling", folder)
    for name in ("word_perplexity", "bits_per_byte"):
        assert metric.values[name] == pytest.approx(results["tiny_rolling"][f"{name},none"], rel=1e-5)
    words = [sample["word_perplexity"] for sample in samples["tiny_rolling"]]
    assert metric.arrays["word_perplexity"] == pytest.approx(np.asarray(words), rel=1e-5)


def test_a_group_has_its_value_and_those_of_its_members(folder, tiny):
    lm = tiny("opt")
    task = LmEvalTask(task="tiny_both", num_fewshot=1, limit=4, include_path=folder)
    metric = task.measure(lm, Runtime(batch_size=4))
    drawn = tasks.sample_documents(11, 4, 0)
    assert metric.arrays["document"].tolist() == drawn * 2
    results, samples = stock(lm, "tiny_choice", folder, 1, documents=drawn)
    assert metric.values["acc/tiny_choice"] == results["tiny_choice"]["acc,none"]
    assert metric.values["acc"] == metric.arrays["correct"].mean()
    assert metric.arrays["correct"].tolist() == [sample["acc"] for sample in samples["tiny_choice"]] * 2
    assert metric.info["members"] == {"tiny_choice": 4, "tiny_other": 4}
    assert (metric.info["documents"], metric.info["available_documents"]) == (8, 22)


def test_contents_are_in_the_key_and_places_are_not(folder, tmp_path):
    def key(place, name="tiny_choice", shots=2):
        task = LmEvalTask(task=name, num_fewshot=shots, include_path=place)
        return {**task.provenance(), "settings": task.key()}

    one = key(folder)
    assert key(written(tmp_path / "same")) == one
    versions = key(written(tmp_path / "later", version=2))
    assert {name for name in one if one[name] != versions[name]} == {"task_version"}
    texts = key(written(tmp_path / "text", near=NOUNS[::-1]))
    assert {name for name in one if one[name] != texts[name]} == {"data_sha256", "shots_sha256"}
    assert key(folder, "tiny_rolling", 0)["prompts_sha256"] != one["prompts_sha256"]
    shots = key(folder, shots=0)
    assert {"settings", "num_fewshot", "shots_sha256"} <= {name for name in one if one[name] != shots[name]}
    url = f"hf://datasets/allenai/ai2_arc@{'0a' * 20}/ARC-Easy/test.parquet"
    assert HUB.match(url)[1] == f"allenai/ai2_arc@{'0a' * 20}"


@pytest.mark.parametrize("quote", ["", '"'])
def test_a_run_names_tasks_with_their_shots(folder, own_home, quote):
    names = f"evals=[{quote}lm_eval/tiny_choice:2{quote},lm_eval/tiny_answer]"
    (job,) = config.jobs(
        ["model=tiny-llama", "method=rtn", names, f"tasks.include_path={folder}", "tasks.limit=5"]
    )
    finished = pipeline.run(job.run, Store(own_home / "store"), own_home, Runtime(), None)
    assert list(finished.metrics) == ["lm_eval/tiny_choice:2", "lm_eval/tiny_answer"]
    assert finished.array("lm_eval/tiny_choice:2", "correct").shape == (5,)
    assert finished.data["run"]["evals"][0] == {
        "kind": "LmEvalTask", "version": 1, "task": "tiny_choice", "num_fewshot": 2, "limit": 5, "seed": 0
    }  # fmt: skip
    again = pipeline.run(job.run, Store(own_home / "store"), own_home, Runtime(), None)
    assert again.file == finished.file


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lm_eval/arc_easy", "lm_eval/arc_easy could not be loaded ("),
        ("lm_eval/arc_eazy", "has no such task; did you mean lm_eval/arc_easy?"),
        ("lm_eval/arc_easy:many", "evals=lm_eval/arc_easy:many is not allowed"),
        ("lm_eval", "lm_eval/<task>[:<shots>]"),
    ],
)
def test_without_hub_or_task_there_is_one_line_before_any_work(name, said, capsys, monkeypatch):
    monkeypatch.setattr(models.Checkpoint, "load", lambda *_: pytest.fail("a model was loaded"))
    assert entry.main(["model=tiny-llama", "method=rtn", f"evals=[{name}]"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line


def test_what_a_task_cannot_do_is_said(folder, tiny):
    zero = {"task": "tiny_zero", "include": "choice.yaml", "num_fewshot": 0}
    code = {"task": "tiny_code", "include": "answer.yaml", "unsafe_code": True}
    for name, task in (("zero", zero), ("code", code)):
        (pathlib.Path(folder) / f"{name}.yaml").write_text(yaml.safe_dump(task))
    with pytest.raises(UserError, match=r"lm_eval/tiny_zero:3 is not possible: tiny_zero is defined without"):
        LmEvalTask(task="tiny_zero", num_fewshot=3, include_path=folder).provenance()
    with pytest.raises(UserError, match=r"lm_eval/tiny_code is not possible: tiny_code runs generated code"):
        LmEvalTask(task="tiny_code", include_path=folder).provenance()
    with pytest.raises(UserError, match=r"tasks\.chat_template=true is not possible"):
        LmEvalTask(task="tiny_choice", chat_template=True).check_text(tiny("llama").tokenizer)
