"""The stages of a run: their failures and what is kept."""

import pytest
import torch
from tiny_jobs import QUICK, run

from teq import config
from teq.data import texts as corpora
from teq.device.runtime import Runtime
from teq.evaluate.perplexity import Perplexity
from teq.models.checkpoint import Checkpoint
from teq.pipeline import run as pipeline
from teq.pipeline.store import Store
from teq.spec import UserError
from teq.stage import Diverged
from teq.transforms.teq.settings import Teq


def cached(finished):
    return {name: stage["cached"] for name, stage in finished.data["stages"].items()}


@pytest.mark.parametrize("stage", ["quantize", "measure"])
def test_a_device_that_cannot_hold_the_model_says_what_to_do_and_keeps_the_scales(
    own_home, monkeypatch, stage
):
    (job,) = config.jobs([*QUICK, "method=teq", "train.steps=2"])

    def full(*_):
        raise torch.OutOfMemoryError("20 GB more were asked for")

    owner = type(job.run.quantizer if stage == "quantize" else job.run.evals[0])
    with monkeypatch.context() as patched:
        patched.setattr(owner, stage, full)
        with pytest.raises(
            UserError, match=r"memory ran out with strategy stream .* what was finished is kept"
        ):
            run(own_home, "method=teq", "train.steps=2")
    assert cached(run(own_home, "method=teq", "train.steps=2"))["scales"]


def test_divergence_keeps_the_scales_and_stores_no_stage(own_home, monkeypatch):
    def diverge(*_):
        raise Diverged("training stopped: the loss is nan at step 7", {"site": torch.ones(3)})

    monkeypatch.setattr(Teq, "fit", diverge)
    with pytest.raises(Diverged, match=r"at step 7; the scales so far are in .*\.safetensors"):
        run(own_home, "method=teq")
    assert len(list((own_home / "failed").glob("*.safetensors"))) == 1
    assert not [p for p in (own_home / "store" / "scales").iterdir() if p.is_dir()]


def test_a_corpus_of_another_text_is_other_work(own_home, monkeypatch):
    """python-docs differs between Python versions: the text's digest is in the keys of what read it."""
    first = run(own_home, "method=teq")
    from teq.data import embedded

    original = embedded.python_docs()
    for module in (embedded, corpora):
        monkeypatch.setattr(module, "python_docs", lambda: "A new topic. " * 30 + original)
    second = run(own_home, "method=teq")
    assert second.id == first.id and second.file != first.file
    assert cached(second)["scales"] is False


@pytest.mark.parametrize(
    ("method", "override", "said"),
    [
        ("teq", "evals=[python-docs,ptb-new]", r"ptb-new gives 12 tokens, one window of ppl\.context=64"),
        ("gptq", "evals=[python-docs,ptb-new]", r"ptb-new gives 12 tokens, one window of ppl\.context=64"),
        (
            "teq+gptq",
            "gptq.length=60000",
            "python-docs gives 55000 tokens, one calibration window needs",
        ),
    ],
)
def test_texts_too_short_are_found_before_any_weight_is_loaded(
    own_home, write, monkeypatch, method, override, said
):
    write("ptb_text_only/test", sentence=["a few words"])
    monkeypatch.setattr(Checkpoint, "load", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=said):
        run(own_home, f"method={method}", override)


def test_evaluations_compute_in_their_own_precision(own_home, monkeypatch):
    def ran(*given):
        (job,) = config.jobs(["model=tiny-llama", "evals=[python-docs]", "ppl.limit=2", *given])
        found = pipeline.run(job.run, Store(own_home / "store"), own_home, Runtime(), None).data
        return job.run, found["stages"], found["metrics"]["python-docs"]["values"]["ppl"]

    seen, measure = [], Perplexity.measure
    monkeypatch.setattr(
        Perplexity,
        "measure",
        lambda self, lm, runtime: seen.append(lm.model.dtype) or measure(self, lm, runtime),
    )
    same, plain, _ = ran("method=rtn", "dtype=bfloat16")
    apart, stages, _ = ran("method=rtn", "dtype=bfloat16", "eval_dtype=float16")
    assert seen == [torch.bfloat16, torch.float16]
    assert stages["weights"]["key"] == plain["weights"]["key"]
    assert stages["python-docs"]["key"] != plain["python-docs"]["key"] and apart.key() != same.key()
    assert ran("method=rtn", "dtype=bfloat16", "eval_dtype=bfloat16")[0].key() == same.key()
    # nothing of the other precision is in what is evaluated
    assert ran("method=fp", "dtype=bfloat16", "eval_dtype=float32")[2] == ran("method=fp", "dtype=float32")[2]


def test_the_paper_trains_in_bfloat16_and_evaluates_in_float16():
    def of(*given):
        run = config.jobs(["method=rtn", *given])[0].run
        return run.dtype, run.eval_dtype

    assert of("model=opt-6.7b") == of("model=llama-7b") == ("bfloat16", "float16")
    assert of("model=opt-6.7b", "dtype=float32") == ("float32", None)
    assert of("model=opt-6.7b", "dtype=float32", "eval_dtype=float16") == ("float32", "float16")
    assert of("model=opt-6.7b", "eval_dtype=bfloat16") == ("bfloat16", None)
    assert of("model=smollm2-135m") == ("float32", None)
