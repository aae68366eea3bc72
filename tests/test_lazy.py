"""Models whose blocks are read when they are used: the same numbers, one block at a time."""

import ctypes
import gc
import json
import platform
import weakref
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from teq import config
from teq.device import waiting
from teq.device.live_bytes import LiveBytes
from teq.device.runtime import Runtime
from teq.evaluate import lastword
from teq.models import Checkpoint, Folder
from teq.models import checkpoint as checkpoints
from teq.models.arch import blocks, families
from teq.models.fold import check_equivalence
from teq.models.lazy import held_bytes, present
from teq.pipeline import estimate, store
from teq.pipeline import run as pipeline
from teq.spec import UserError
from teq.transforms.teq import train

METHODS = ("rtn", "gptq", "teq+gptq", "awq", "smoothquant", "fp", "rtn quant_grid.search=clip")
METHODS += ("gptq gptq.input_correction=0.5", "teq train.objective=kl")
METHODS += ("signround signround.iterations=30 signround.lr=0.02",)
METHODS += ("teq train.objective=block train.bounds_lr=0.01 train.steps=20 train.batch=2",)
METHODS += ("rtn finetune=scales tune.lr=0.01 tune.steps=4", "teq+gptq finetune=scales+norms")
METHODS += ("gptq gptq.order=act finetune=scales+norms",)
SMALL = ["recipe=quick", "bits=3", "group_size=16", "gptq.samples=4", "gptq.length=48", "train.length=48"]
SMALL += ["train.steps=3", "awq.samples=4", "awq.length=48", "smoothquant.samples=4", "smoothquant.length=48"]
SMALL += ["signround.samples=16", "signround.length=48", "signround.batch=4"]
SMALL += ["tune.steps=12", "tune.length=48", "tune.batch=2", "tune.lr=0.002"]
SMALL += ["evals=[python-docs,lastword-python-docs]", "ppl.context=48", "ppl.limit=5"]


@pytest.fixture(autouse=True)
def few_items(monkeypatch):
    """The cloze task has no limit; a few of its items stream like all."""
    few = lastword.items()[:16]
    monkeypatch.setattr(lastword, "items", lambda: few)


@pytest.fixture
def saved(tmp_path):
    """A function that saves a family's tiny model in bf16 as transformers does, and gives its checkpoint."""

    def save(family):
        (job,) = config.jobs([f"model=tiny-{family}", "method=fp"])
        source, folder = job.run.model.source, tmp_path / family
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(source.dimensions())  # GPT-2 has its Conv1D here
        torch.nn.utils.vector_to_parameters(
            5 * torch.nn.utils.parameters_to_vector(model.parameters()) + 0.02, model.parameters()
        )
        model.bfloat16().save_pretrained(folder)
        source.tokenizer().save_pretrained(folder)
        return Checkpoint(name="saved", source=Folder(path=str(folder)), arch=job.run.model.arch)

    return save


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", families())
def test_a_lazy_model_computes_what_the_model_does(saved, family, dtype):
    checkpoint, tokens = saved(family), torch.arange(2, 42)[None]
    whole, lazy = (checkpoint.load(dtype, "cpu", lazy=how) for how in (False, True))
    for _ in range(2):  # what was read is dropped and read again
        assert torch.equal(lazy.model(tokens).logits, whole.model(tokens).logits)
    inside = {f"{name}." for name in blocks(lazy.model, lazy.arch)}
    for name, parameter in lazy.model.named_parameters():
        assert parameter.is_meta == name.startswith(tuple(inside)), name
    for ours, theirs in zip(lazy.model.buffers(), whole.model.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    check_equivalence(lazy.model, lazy.arch)


def test_one_block_is_in_memory_and_what_is_written_to_it_is_lost(saved):
    lm = saved("llama").load("bfloat16", "cpu", lazy=True)
    every = list(blocks(lm.model, lm.arch).values())
    alive, most = weakref.WeakSet(), []

    def note(module, *_):
        alive.update(module.parameters())
        gc.collect()
        most.append(len(alive))

    for block in every:
        block.mlp.register_forward_pre_hook(note)
    with torch.no_grad():
        lm.model(torch.arange(9)[None])
    assert most == [len(list(every[0].mlp.parameters()))] * len(every)
    with present(every[0]):
        before = every[0].mlp.up_proj.weight.clone()
        every[0].mlp.up_proj.weight.zero_()
    with present(every[0]), present(every[0]):
        assert torch.equal(every[0].mlp.up_proj.weight, before)
    held, block = held_bytes(lm.model, lm.arch)
    assert held + len(every) * block == sum(t.nbytes for t in (*lm.model.parameters(), *lm.model.buffers()))


def finished(saved, home, family, method, memory):
    """A run's stages' digests and record; the model is whole in memory only for memory=keep."""
    words = ["model=auto", f"model.path={saved(family).source.path}", f"method={method.split()[0]}"]
    (job,) = config.jobs([*words, *SMALL, *method.split()[1:], f"memory={memory}"])
    other = (Folder, "model") if memory != "keep" else (checkpoints, "lazy_model")
    with mock.patch.object(*other, side_effect=AssertionError(f"memory={memory}")) as loaded:
        run = pipeline.run(job.run, store.Store(home / "store"), home, Runtime(memory=memory), None)
    assert not loaded.called
    record = run.data
    return {name: stage["digest"] for name, stage in record["stages"].items()}, record


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what was freed below an end")
def test_memory_that_a_block_freed_goes_back_to_the_system(saved):
    lazy, arch = (checkpoint := saved("llama")).load("float32", "cpu", lazy=True).model, checkpoint.arch
    libc, size = ctypes.CDLL(None), 100_000  # bytes, less than glibc maps by themselves
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    with present(next(iter(blocks(lazy, arch).values()))):
        before = anonymous()
        used = [libc.malloc(size) for _ in range(1000)]
        for at in used:
            ctypes.memset(at, 1, size)
        last = libc.malloc(size)  # what it holds keeps the heap's end where it is
        ctypes.memset(last, 1, size)
        for at in used:
            libc.free(at)
        kept = anonymous() - before
    assert kept > 90e6
    assert anonymous() - before < 20e6
    libc.free(last)


def anonymous():
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("method", METHODS)
def test_every_stage_is_the_same_to_the_bit_when_it_is_streamed(saved, own_home, method):
    kept, streamed = (finished(saved, own_home / m, "llama", method, m) for m in ("keep", "stream"))
    assert kept[0] == streamed[0]
    assert json.dumps(kept[1]["metrics"]) == json.dumps(streamed[1]["metrics"])
    assert kept[1].get("finetune", {"kept": True})["kept"]  # else nothing tuned was compared


@pytest.mark.parametrize("family", ["opt", "bloom", "gemma3", "gpt2", "gpt_neox", "falcon", "qwen3_moe"])
def test_other_families_stream_to_the_same_bits(saved, own_home, family):
    kept, streamed = (finished(saved, own_home / m, family, "gptq", m)[0] for m in ("keep", "stream"))
    assert kept == streamed


def test_divergence_and_its_reference_stream(saved, own_home, monkeypatch):
    """In passes of two windows: as many as the hidden states that may wait."""
    from teq.evaluate import perplexity

    monkeypatch.setattr(perplexity, "PASS", 2 * 48 * 64 * 2 + 1)
    method = "rtn ppl.kl=true dtype=bfloat16"
    kept, streamed = (finished(saved, own_home / m, "llama", method, m)[0] for m in ("keep", "stream"))
    assert kept == streamed and "reference/python-docs" in kept


@pytest.mark.parametrize("memory", ["keep", "stream"])
@pytest.mark.parametrize(
    "method",
    [
        "gptq gptq.input_correction=0.5 ppl.kl=true finetune=scales",
        "teq train.objective=kl dtype=bfloat16",
        "teq train.objective=block train.bounds_lr=0.01 train.steps=20 train.batch=2",
    ],
)
def test_hidden_states_in_a_file_change_no_bit(saved, own_home, monkeypatch, method, memory):
    kept = finished(saved, own_home / "a", "llama", method, "keep")[0]
    monkeypatch.setattr(waiting, "fits", lambda size: False)
    with mock.patch.object(torch, "from_file", wraps=torch.from_file) as mapped:
        assert finished(saved, own_home / "b", "llama", method, memory)[0] == kept
    assert mapped.called and not [file for file in own_home.iterdir() if file.is_file()]


def test_windows_that_were_all_measured_before_a_kill_are_not_read_again(saved, tmp_path):
    (job,) = config.jobs(["model=tiny-llama", "method=fp", *SMALL])
    lm, perplexity = saved("llama").load("float32", "cpu", lazy=True), job.run.evals[0]
    once, again = (perplexity.measure(lm, Runtime(partial=tmp_path / "state")) for _ in range(2))
    assert once.values == again.values


def test_a_budget_below_the_model_streams_it(saved, own_home):
    """The weights alone take 0.35 MB in fp32: nothing is trained, so every stage gets by with one block."""
    digests, _ = finished(saved, own_home / "a", "llama", "gptq", "0.2MB")
    assert digests == finished(saved, own_home / "b", "llama", "gptq", "keep")[0]


def test_text_is_not_generated_from_weights_that_are_read_for_every_token(saved):
    from teq.evaluate import tasks

    lm = saved("llama").load("float32", "cpu", lazy=True)
    task = type("Task", (), {"OUTPUT_TYPE": "generate_until", "eval_docs": [1], "set_fewshot_seed": id})()
    with pytest.raises(UserError, match=r"writes generates text, .* under memory=stream"):
        tasks.score(None, {"tasks": {"writes": task}}, {}, lm, Runtime())


def test_a_checkpoint_that_transformers_renames_has_the_models_names(saved):
    checkpoint = saved("gpt_neox")
    assert "embed_out" in "".join(checkpoint.source.tensors("float32").stored["lm_head.weight"][1:])
    assert AutoConfig.from_pretrained(checkpoint.source.path).model_type == "gpt_neox"


@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize("stage", ["train", "rtn", "gptq", "tune", "ppl"])
def test_the_memory_of_a_streamed_stage_is_predicted(saved, tmp_path, family, stage):
    """In fp32, of files in bf16: what is read is made by an operator, which is counted."""
    words = [f"model=tiny-{family}", "method=teq+gptq" if stage in ("train", "gptq") else "method=rtn"]
    words += ["finetune=scales+norms"] * (stage == "tune")
    (job,) = config.jobs([*words, *SMALL, "gptq.samples=2", "train.steps=2", "ppl.limit=2", "tune.steps=2"])
    run, checkpoint = job.run, saved(family)
    work = {"train": run.transform, "ppl": run.evals[0], "tune": run.finetune}.get(stage, run.quantizer)
    sizes = checkpoint.source.dimensions()
    planned = estimate.required(work, sizes, run.model.arch, "float32", "stream")
    lm = checkpoint.load("float32", "cpu", lazy=True)
    held = held_bytes(lm.model, lm.arch)[0]
    how = Runtime(memory="stream", strategy="stream", partial=tmp_path)
    weights = run.quantizer.quantize(lambda: lm, {}, Runtime())[0] if stage == "tune" else {}
    check_equivalence(lm.model, lm.arch)  # whose fp64 copy of a block is no part of a step
    with LiveBytes() as live, mock.patch.object(train, "check_equivalence"):
        if stage == "train":
            work.fit(lambda: lm, how, lambda *_: None)
        elif stage == "ppl":
            with mock.patch("torch.inference_mode", torch.no_grad):
                work.measure(lm, how)
        elif stage == "tune":
            live.count(t for name, t in weights.items() if name.endswith("/scale"))  # as on a GPU
            work.tune(lambda: lm, weights, how)
        else:
            work.quantize(lambda: lm, {}, how)
    assert planned.bytes == pytest.approx(held + live.peak, rel=0.15)
