"""GPTQ when the device's memory runs out."""

import pytest
import torch
from conftest import in_a_cycle

from teq import config
from teq.device.runtime import Runtime
from teq.quantizers.gptq import blocks as gptq_blocks
from teq.spec import UserError


def test_gptq_goes_on_with_its_hidden_states_in_host_memory(monkeypatch, caplog):
    (job,) = config.jobs(["model=tiny-llama", "method=gptq", "gptq.samples=2", "gptq.length=16"])
    loaded, waited = [], []

    def load():
        loaded.append(job.run.model.load("float32", "cpu"))
        return loaded[-1]

    def quantize(*_, waiting, **__):
        waited.append(waiting)
        if waiting is None:
            raise torch.OutOfMemoryError("2 GB")
        return {}, {"gptq": {}}

    monkeypatch.setattr(gptq_blocks, "quantize_blocks", quantize)
    job.run.quantizer.quantize(load, {}, Runtime(device="cuda:0", memory="keep"))
    assert waited == [None, "cpu"] and len(loaded) == 2
    assert "GPTQ: its hidden states go to the host" in caplog.text
    with pytest.raises(torch.OutOfMemoryError):
        job.run.quantizer.quantize(load, {}, Runtime(device="cpu"))


def test_gptqs_first_model_is_gone_before_the_second_is_loaded(monkeypatch, only_counted_references):
    (job,) = config.jobs(["model=tiny-llama", "method=gptq", "gptq.samples=2", "gptq.length=16"])
    models = []

    def load():
        assert not any(model() is not None for model in models)
        lm = job.run.model.load("float32", "cpu")
        models.append(in_a_cycle(lm))
        return lm

    def quantize(*_, waiting, **__):
        if waiting is None:
            raise torch.OutOfMemoryError("2 GB")
        return {}, {"gptq": {}}

    monkeypatch.setattr(gptq_blocks, "quantize_blocks", quantize)
    job.run.quantizer.quantize(load, {}, Runtime(device="cuda:0", memory="keep"))
    assert len(models) == 2


def test_input_correction_is_in_the_key_only_where_it_is_used():
    def gptq(*overrides):
        (job,) = config.jobs(["model=tiny-llama", "method=gptq", *overrides])
        return job.run.quantizer

    assert "input_correction" not in gptq().plain() and gptq("gptq.input_correction=0").key() == gptq().key()
    assert gptq("gptq.input_correction=0.25").plain()["input_correction"] == 0.25
    with pytest.raises(
        UserError, match=r"gptq\.input_correction=0\.3 is not allowed: it must be one of 0\.0"
    ):
        gptq("gptq.input_correction=0.3")
