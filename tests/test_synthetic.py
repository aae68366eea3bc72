"""Models made in memory."""

import pytest
import torch
from conftest import source_of

from teq import config, models
from teq.models.checkpoint import Random, Synthetic
from teq.models.synthetic import build, byte_tokenizer, fill


def test_random_weights_are_the_same_for_the_same_seed_and_have_random_norms_and_biases(family, tiny):
    a, b = tiny(family).model.state_dict(), tiny(family).model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    for name, value in a.items():
        if value.ndim == 1:
            assert value.std() > 0.01 and value.abs().min() > 0, name


def test_another_seed_is_another_model():
    source = source_of("tiny-llama")
    other = Random(config=source.config, seed=1, bos=source.bos)
    assert other.fingerprint() != source.fingerprint()
    assert not torch.equal(build(source).lm_head.weight, build(other).lm_head.weight)


def synthetic(model, dtype="bfloat16", seed=None):
    source = source_of(model, "model.weights=synthetic")
    source = source if seed is None else Synthetic(config=source.config, seed=seed)
    lm = models.Checkpoint(name=model, source=source, arch=arch_of(model.removeprefix("tiny-"))).load(
        dtype, "cpu"
    )
    return lm.model


def test_synthetic_weights_are_the_same_for_the_same_seed_in_the_dtype_asked_for(family):
    a, b, other = (synthetic(f"tiny-{family}", seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(a[name], b[name]) for name in a)
    for name, value in a.items():
        assert value.dtype == torch.bfloat16 and value.float().std() > 1e-3, name
        assert not torch.equal(value, other[name]), name
    assert all(p.dtype == torch.float16 for p in synthetic(f"tiny-{family}", "float16").parameters())


def test_synthetic_weights_are_heavy_tailed_with_outlier_channels():
    weight = torch.empty(2048, 1024)
    fill(weight, False, torch.Generator().manual_seed(0))
    by_channel = weight.std(0)
    outliers = by_channel > 2.2 * by_channel.median()
    assert 8 <= outliers.sum() <= 20  # one in 128, and the upper end of the log-normal sizes
    assert by_channel.max() > 3 * by_channel.median()
    z = weight[:, ~outliers] / weight[:, ~outliers].std()
    assert 5 < float((z**4).mean()) < 8  # 3 for a normal
    assert float(weight.std()) == pytest.approx(1024**-0.5, rel=0.3)


def test_synthetic_keeps_tied_heads_tied_and_computes_finite_logits(family):
    model = synthetic(f"tiny-{family}")
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is embedding) == model.config.tie_word_embeddings == (family != "llama")
    logits = model(torch.arange(40)[None]).logits
    assert logits.std() > 0 and torch.isfinite(logits).all()


def test_synthetic_weights_of_another_device_have_another_identity_and_a_cpus_the_one_they_had():
    """A generator's numbers depend on the kind of device that draws them."""
    (job,) = config.jobs(["model=tiny-llama", "model.weights=synthetic"])
    model, real = job.run.model, config.jobs(["model=tiny-llama"])[0].run.model
    assert model.source.fingerprint("cpu") == model.source.fingerprint()
    assert (
        model.source.fingerprint("cuda:0")
        == model.source.fingerprint("cuda:1")
        == f"{model.source.fingerprint()}.cuda"
    )
    assert real.source.fingerprint("cuda:0") == real.source.fingerprint("cpu")
    assert model.load("float32", "cpu").identity == model.source.fingerprint("cpu")


def test_the_keys_of_synthetic_weights_drawn_on_a_gpu_are_not_those_of_a_cpu(own_home, monkeypatch):
    """`device` goes to pipeline.run as a GPU's; the weights are drawn on the CPU, as there is no GPU."""
    from teq.device.runtime import Runtime
    from teq.pipeline import cost
    from teq.pipeline import run as pipeline
    from teq.pipeline.store import Store

    (job,) = config.jobs(
        ["model=tiny-llama", "model.weights=synthetic", "method=rtn", "evals=[python-docs]", "ppl.limit=1"]
    )
    asked = []

    class Stopped(Exception):
        pass

    def get(self, stage, *_, **__):
        asked.append(stage)
        raise Stopped

    monkeypatch.setattr(Store, "get", get)
    monkeypatch.setattr(cost, "machine", lambda _: {})
    for device in ("cpu", "cuda:0"):
        with pytest.raises(Stopped):
            pipeline.run(job.run, Store(own_home), own_home, Runtime(device=device), None)
    assert asked[0].key != asked[1].key
    assert asked[0].reads["weights"].reads["scales"].key != asked[1].reads["weights"].reads["scales"].key


def test_synthetic_buffers_are_the_architectures_own():
    """Rotary frequencies are no parameters: unfilled they would be whatever was in memory."""
    ours, made = (
        m.model.rotary_emb.inv_freq for m in (synthetic("tiny-llama"), build(source_of("tiny-llama")))
    )
    assert ours.dtype == torch.float32 and torch.equal(ours, made)


def test_synthetic_needs_no_checkpoint_and_says_so(hub_cache):
    source = source_of("opt-6.7b", "model.weights=synthetic", "method=gptq")
    assert source.plain()["kind"] == "Synthetic" and source.fingerprint().startswith("synthetic:")
    assert source.fingerprint() != source_of("opt-13b", "model.weights=synthetic").fingerprint()


def test_byte_tokenizer_round_trips_and_puts_its_bos_once():
    text = "Hé, world\n\x00€"
    for bos in (True, False):
        tokenizer = byte_tokenizer(bos)
        ids = tokenizer(text).input_ids
        assert ids.count(0) == int(bos) and len(ids) == len(text.encode()) + bos
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def arch_of(family):
    (job,) = config.jobs([f"model=tiny-{family}"])
    return job.run.model.arch
