"""KL and top-1 agreement with the float model, beside perplexity: against full logits, and as a stage."""

import copy

import numpy as np
import pytest
import torch
from conftest import documents

from teq import config
from teq.device.runtime import Runtime
from teq.evaluate import perplexity
from teq.evaluate.perplexity import Perplexity, compare_window, head_input
from teq.pipeline import run as pipeline
from teq.pipeline.store import Store

SHORT = ["model=tiny-llama", "evals=[python-docs]", "ppl.limit=3", "ppl.context=64", "group_size=16"]


def rounded(lm):
    """The model with coarser weights in its blocks: the head stays."""
    other = copy.deepcopy(lm.model)
    for name, parameter in other.named_parameters():
        if "layers" in name or ".h." in name:
            parameter.data = (parameter.data * 20).round() / 20
    return other


def full(float_model, model, window):
    """Mean KL and agreement from the whole logits, by torch."""
    p, q = (m(window).logits[0, :-1].float().log_softmax(-1) for m in (float_model, model))
    divergence = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    return divergence.item(), (p.argmax(-1) == q.argmax(-1)).float().mean().item()


@torch.no_grad()
def test_it_is_the_divergence_of_full_logits(tiny, family):
    lm = tiny(family)
    model, window = rounded(lm), torch.randint(4, 250, (1, 100), generator=torch.Generator().manual_seed(0))
    loss, kl, top1 = compare_window(model, window, head_input(lm.model, window)).tolist()
    expected = full(lm.model, model, window)
    assert kl == pytest.approx(expected[0], rel=1e-4) and kl > 1e-4
    assert top1 == pytest.approx(expected[1], abs=1e-6)
    assert loss == pytest.approx(perplexity.window_loss(model, window).item(), rel=1e-6)


@torch.no_grad()
def test_the_float_model_has_no_divergence_from_itself(tiny, family):
    for dtype in ("float32", "bfloat16"):
        lm = tiny(family, dtype=dtype)
        window = torch.arange(4, 68)[None]
        _, kl, top1 = compare_window(lm.model, window, head_input(lm.model, window)).tolist()
        assert abs(kl) < 1e-6 and top1 == 1


@torch.no_grad()
def test_what_a_model_does_to_its_logits_counts():
    """Gemma 2 caps its logits, Granite divides them: the same is done to the float model's."""
    from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig

    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    window = torch.arange(1, 40)[None]
    for made in (
        Gemma2Config(**sizes, final_logit_softcapping=0.5),
        GraniteConfig(**sizes, logits_scaling=0.1),
    ):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(made).eval()
        model.get_output_embeddings().weight.mul_(4)
        other = copy.deepcopy(model)
        for parameter in other.base_model.layers.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        _, kl, top1 = compare_window(other, window, head_input(model, window)).tolist()
        assert (kl, top1) == pytest.approx(full(model, other, window), rel=1e-4, abs=1e-6)


def test_the_reference_is_made_once_for_all_methods(own_home, monkeypatch):
    passes, original = [], perplexity.head_input
    monkeypatch.setattr(perplexity, "head_input", lambda *args: passes.append(None) or original(*args))
    found = {}
    for method in ("fp", "rtn"):
        (job,) = config.jobs([*SHORT, f"method={method}", "ppl.kl=true"])
        found[method] = pipeline.run(job.run, Store(own_home / "store"), own_home, Runtime(), None)
    assert len(passes) == 3
    stages = [one.data["stages"]["reference/python-docs"] for one in found.values()]
    assert stages[0]["key"] == stages[1]["key"] and [stage["cached"] for stage in stages] == [False, True]
    floats, rtn = (one.metrics["python-docs"] for one in found.values())
    assert abs(floats["values"]["kl"]) < 1e-6 and floats["values"]["top1"] == 1
    assert rtn["values"]["kl"] > 1e-4 and rtn["values"]["top1"] < 1
    for name in ("kl", "top1"):
        windows = found["rtn"].array("python-docs", f"window_{name}")
        assert windows.shape == (3,) and rtn["values"][name] == pytest.approx(windows.mean())


def test_without_it_keys_and_numbers_are_those_from_before(own_home):
    (plain,) = config.jobs([*SHORT, "method=rtn"])
    (with_kl,) = config.jobs([*SHORT, "method=rtn", "ppl.kl=true"])
    assert "kl" not in plain.run.evals[0].plain() and plain.run.key() != with_kl.run.key()
    found = [
        pipeline.run(job.run, Store(own_home / "store"), own_home, Runtime(), None)
        for job in (plain, with_kl)
    ]
    assert "reference/python-docs" not in found[0].data["stages"]
    values = [one.metrics["python-docs"]["values"]["ppl"] for one in found]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


@pytest.mark.parametrize("killed", ["head_input", "compare_window"])
def test_killed_and_resumed_it_gives_the_same(write, tiny, tmp_path, monkeypatch, killed):
    write("ptb_text_only/test", sentence=documents(200, words=6))
    lm, setting = tiny("opt"), Perplexity(corpus="ptb-new", context=64, limit=5, kl=True)
    model = rounded(lm)
    quantized = type(lm)(model, lm.tokenizer, lm.arch, "rounded")
    done, original = [], getattr(perplexity, killed)

    def evaluated(folder):
        reference = setting.reference(lm, Runtime(partial=folder and folder / "reference"))
        return setting.measure(quantized, Runtime(partial=folder and folder / "metrics"), reference)

    def interrupted(*args):
        done.append(None)
        if len(done) == 4:
            raise KeyboardInterrupt
        return original(*args)

    expected = evaluated(None)
    monkeypatch.setattr(perplexity, killed, interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluated(tmp_path)
    resumed = evaluated(tmp_path)
    assert len(done) == 4 + 5 - 3  # finished windows are not computed again
    assert resumed.values == expected.values
    for name, array in expected.arrays.items():
        assert np.array_equal(resumed.arrays[name], array)
