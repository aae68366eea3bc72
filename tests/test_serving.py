"""An exported model in llama.cpp's server, which computes on the packed codes."""

import dataclasses

import pytest
import torch

import teq
from benchmarks.contenders.server import Server, llama_cpp
from teq import config
from teq.__main__ import main

PROMPT = "The interpreter reads a file, and then it prints what each of its lines evaluates to."


def with_merges(folder):
    """Write a tiny model whose tokenizer merges bytes: llama.cpp loads no other."""
    (job,) = config.jobs(["model=tiny-llama"])
    source = job.run.model.source
    larger = dataclasses.replace(source, config=source.config | {"vocab_size": 320})
    larger.model("float32", "cpu", "cpu").save_pretrained(folder)
    larger.tokenizer().train_new_from_iterator([PROMPT] * 10, 320).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bits", [4, 5, 8])
def test_llama_cpps_server_gives_our_probabilities_to_every_token_of_a_prompt(tmp_path, bits):
    pytest.importorskip("llama_cpp", reason="needs `pip install 'llama-cpp-python[server]'`")
    given = ["model=tiny-llama", f"model.path={with_merges(tmp_path / 'model')}", "method=rtn", "device=cpu"]
    given += [f"bits={bits}", "group_size=32", "symmetric=true", "quant_grid.scale_dtype=float16"]
    given += ["evals=[python-docs]", "ppl.limit=2", "ppl.context=64"]
    assert main(["export", *given, "--format", "gguf", "--to", str(tmp_path / "out")]) == 0
    file = tmp_path / "out" / "model.gguf"
    with Server(llama_cpp(file, threads=1), threads=1) as running:
        answer = running.complete(file, PROMPT, 1, echo=True, logprobs=1)["choices"][0]["logprobs"]
    model, tokenizer = teq.load(tmp_path / "out")
    tokens = torch.tensor([tokenizer(PROMPT).input_ids])
    with torch.inference_mode():
        scores = model(tokens).logits.log_softmax(-1)[0, :-1]
    ours = scores.gather(1, tokens[0, 1:, None])[:, 0]
    theirs = torch.tensor(answer["token_logprobs"][1 : len(ours)])  # of the first token it gives none
    assert answer["tokens"][: len(ours)] == [tokenizer.decode(token) for token in tokens[0, 1:]]
    # llama.cpp rounds activations to 8 bits; probabilities of other tokens differ by about 1
    assert (theirs - ours[1:]).abs().mean() < 0.05
