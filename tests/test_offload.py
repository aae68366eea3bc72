"""Blocks that wait in the host's memory."""

import dataclasses
import weakref

import torch
from tiny_jobs import job_of
from transformers import AutoModelForCausalLM

from teq.device import offload
from teq.device.runtime import Runtime
from teq.transforms.teq.settings import Teq


def test_offload_holds_three_blocks_at_most_and_copies_each_twice_a_step(monkeypatch):
    run = job_of("llama").run
    dimensions = run.model.source.dimensions()
    dimensions.num_hidden_layers = count = 7
    model = AutoModelForCausalLM.from_config(dimensions).eval().requires_grad_(False)
    alive, most, copies = weakref.WeakSet(), [], []
    plain = offload.Stream._copied

    def copied(self, index):
        parameters = plain(self, index)
        copies.append(index)
        alive.add(parameters["block.mlp.down_proj.weight"])
        most.append(len(alive))
        return parameters

    monkeypatch.setattr(offload.Stream, "_copied", copied)
    settings = dataclasses.replace(run.transform, steps=4)
    tokens = torch.randint(200, (4, 32))
    settings.train_on(model, run.model.arch, tokens, Runtime(strategy="offload"))
    assert isinstance(settings, Teq)
    assert max(most) <= 3
    # forward 0 .. n-1, backward n-2 .. 0: the two turning points serve both ways
    assert len(copies) == 4 * (2 * count - 2) + 1
