"""Perplexity against plain loops, and the token windows of each protocol against GPTQ's code."""

import dataclasses
import hashlib
import itertools
import math
import random

import numpy as np
import pytest
import torch
from conftest import documents

from teq.data import texts as corpora
from teq.data.sources import SOURCES
from teq.device.runtime import Runtime
from teq.evaluate import perplexity
from teq.evaluate.perplexity import Perplexity, window_loss
from teq.models.synthetic import byte_tokenizer
from teq.spec import UserError


@pytest.fixture
def small_shard(monkeypatch):
    """C4's shard made smaller, so that a mirror of it is not a part: its number of documents."""
    monkeypatch.setitem(SOURCES, "c4", dataclasses.replace(SOURCES["c4"], rows=600))
    return 600


def plain_loop(model, tokens, context):
    """The usual script: exp of the mean of the model's own losses."""
    losses = []
    for i in range(len(tokens) // context):
        x = torch.tensor([tokens[i * context : (i + 1) * context]])
        with torch.no_grad():
            losses.append(model(x, labels=x).loss.item())
    return math.exp(sum(losses) / len(losses)), losses


def test_perplexity_is_the_plain_loop(write, tiny, family):
    texts = documents(200, words=6)
    write("ptb_text_only/test", sentence=texts)
    lm = tiny(family)
    tokens = lm.tokenizer(" ".join(texts)).input_ids
    expected, losses = plain_loop(lm.model, tokens, 128)
    metric = Perplexity(corpus="ptb-new", context=128).measure(lm, Runtime())
    assert metric.values["ppl"] == pytest.approx(expected, rel=1e-6)
    assert metric.arrays["window_loss"] == pytest.approx(np.array(losses), rel=1e-6)
    assert metric.info["windows"] == metric.info["available_windows"] == len(tokens) // 128 == len(losses)
    assert metric.info["partial"] is True
    used = np.array(tokens[: len(losses) * 128], dtype=np.int64)
    assert metric.info["tokens_sha256"] == hashlib.sha256(used.tobytes()).hexdigest()


def test_perplexity_goes_on_from_its_last_finished_window(write, tiny, tmp_path, monkeypatch):
    write("ptb_text_only/test", sentence=documents(200, words=6))
    lm, setting = tiny("opt"), Perplexity(corpus="ptb-new", context=128, limit=7)
    expected, measured = setting.measure(lm, Runtime()), []

    def interrupted(*args):
        measured.append(None)
        if len(measured) == 4:
            raise KeyboardInterrupt
        return window_loss(*args)

    monkeypatch.setattr(perplexity, "window_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        setting.measure(lm, Runtime(partial=tmp_path))
    resumed = setting.measure(lm, Runtime(partial=tmp_path))
    assert len(measured) == 4 + 7 - 3
    assert resumed.values == expected.values and resumed.info == expected.info
    assert resumed.arrays["window_loss"].tobytes() == expected.arrays["window_loss"].tobytes()


def test_a_limit_takes_evenly_spaced_or_the_first_windows(write, tiny):
    write("ptb_text_only/test", sentence=documents(200, words=6))
    lm, settings = tiny("opt"), {"corpus": "ptb-new", "context": 128}
    whole = Perplexity(**settings).measure(lm, Runtime())
    count = whole.info["windows"]
    losses = whole.arrays["window_loss"].tolist()
    evenly = [round(i * (count - 1) / 4) for i in range(5)]
    assert evenly[0] == 0 and evenly[-1] == count - 1 and len(set(evenly)) == 5
    for windows, taken in {"even": evenly, "first": range(5)}.items():
        few = Perplexity(**settings, limit=5, windows=windows).measure(lm, Runtime())
        assert few.arrays["window_loss"].tolist() == [losses[i] for i in taken]
        assert (few.info["windows"], few.info["available_windows"]) == (5, count)
        assert few.info["tokens_sha256"] != whole.info["tokens_sha256"]


def test_evenly_spaced_windows_are_distinct_and_reach_both_ends(write):
    write("ptb_text_only/test", sentence=documents(60, words=6))
    tokenizer = byte_tokenizer(bos=True)
    every, count = corpora.windows("ptb-new", tokenizer, 32)
    place = {tuple(window): i for i, window in enumerate(every.tolist())}
    assert len(place) == count
    for limit in range(1, count + 3):
        taken = corpora.windows("ptb-new", tokenizer, 32, limit, even=True)[0].tolist()
        places = [place[tuple(window)] for window in taken]
        assert len(set(places)) == min(limit, count) and places == sorted(places)
        assert places[0] == 0 and (places[-1] == count - 1 or limit == 1)
        steps = [b - a for a, b in itertools.pairwise(places)]
        assert not steps or max(steps) - min(steps) <= 1


def test_windows_that_are_the_same_have_one_key():
    """All windows, and the random draws of c4, are the same however they would be spaced."""
    for same in ({"corpus": "wikitext2"}, {"corpus": "c4", "limit": 9}):
        keys = {Perplexity(context=64, windows=windows, **same).key() for windows in ("even", "first")}
        assert len(keys) == 1
    limited = [Perplexity(corpus="wikitext2", context=64, limit=9, windows=w) for w in ("even", "first")]
    assert limited[0].key() != limited[1].key()
    assert "windows" not in limited[1].plain()  # as in the published records


def test_losses_are_fp32_whatever_the_model_is(tiny):
    lm = tiny("llama", dtype="bfloat16")
    window = torch.arange(2, 66)[None]
    loss = window_loss(lm.model, window)
    assert loss.dtype == torch.float32
    logits = lm.model(window).logits[0, :-1].double()
    picked = logits.log_softmax(-1).gather(1, window[0, 1:, None])
    assert loss.item() == pytest.approx(-picked.mean().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "file", "column", "joint"),
    [
        ("wikitext2", "wikitext-2-raw-v1/test", "text", "\n\n"),
        ("ptb", "ptb_text_only/validation", "sentence", "\n\n"),
        ("ptb-new", "ptb_text_only/test", "sentence", " "),
        ("c4-new", "c4/validation", "text", " "),
    ],
)
def test_rows_are_joined_into_one_stream(write, name, file, column, joint):
    texts = documents(60)
    write(file, **{column: texts})
    tokenizer = byte_tokenizer(bos=True)
    stream = [tokenizer.bos_token_id, *tokenizer(joint.join(texts), add_special_tokens=False).input_ids]
    windows, available = corpora.windows(name, tokenizer, 64)
    assert available == len(stream) // 64
    assert windows.tolist() == [stream[i * 64 : (i + 1) * 64] for i in range(available)]


def test_c4_new_ends_at_256_windows(write):
    write("c4/validation", text=documents(1100))
    windows, available = corpora.windows("c4-new", byte_tokenizer(bos=False), 16)
    assert (windows.shape, available) == ((256, 16), 256)


def test_c4_draws_the_windows_of_gptq(write, small_shard):
    shard = [f"{i:06d} " * (i % 12) for i in range(small_shard)]
    write("c4/validation", text=shard)
    tokenizer = byte_tokenizer(bos=True)
    random.seed(0)  # from here on as IST-DASLab/gptq's datautils.get_c4 does
    expected = []
    for _ in range(256):
        while True:
            i = random.randint(0, len(shard) - 1)
            tokens = tokenizer(shard[i]).input_ids
            if len(tokens) > 64:
                break
        i = random.randint(0, len(tokens) - 64 - 1)
        expected.append(tokens[i : i + 64])
    windows, available = corpora.windows("c4", tokenizer, 64)
    assert available == 256
    assert windows.tolist() == expected
    assert any(window[0] == tokenizer.bos_token_id for window in expected)
    few, available = corpora.windows("c4", tokenizer, 64, limit=9)
    assert (few.tolist(), available) == (expected[:9], 256)


def test_texts_that_are_too_short(write, tiny, small_shard):
    write("ptb_text_only/test", sentence=["a few words"])
    with pytest.raises(UserError, match=r"ptb-new gives 12 tokens, one window of ppl\.context=64 needs more"):
        Perplexity(corpus="ptb-new", context=64).measure(tiny("opt"), Runtime())
    write("c4/validation", text=["short"] * small_shard)
    with pytest.raises(UserError, match="drawn in a row have at most 64 tokens"):
        corpora.windows("c4", byte_tokenizer(bos=True), 64)


def test_bad_settings_are_named(tiny):
    with pytest.raises(UserError, match=r"ppl\.limit=0 is not allowed"):
        Perplexity(corpus="ptb", context=64, limit=0)
    with pytest.raises(UserError, match="'ptb3' is not allowed: it must be one of python-docs, wikitext2"):
        Perplexity(corpus="ptb3", context=64)
    with pytest.raises(UserError, match=r"ppl\.context=4096 is not allowed: the model has 2048 positions"):
        Perplexity(corpus="python-docs", context=4096).measure(tiny("opt"), Runtime())


def test_python_docs_is_measured_behind_its_calibration_part(tiny):
    lm = tiny("llama")
    windows, available = corpora.windows("python-docs", lm.tokenizer, 512, 3)
    stream = lm.tokenizer(corpora.python_docs()).input_ids
    assert windows.flatten().tolist() == stream[60_000 : 60_000 + 3 * 512]
    assert available == (len(stream) - 60_000) // 512


def test_bits_per_byte_are_those_of_the_predicted_text(write, tiny):
    """A tokenizer of bytes predicts one byte with each token: bits of a token."""
    write("ptb_text_only/test", sentence=documents(200, words=6))
    metric = Perplexity(corpus="ptb-new", context=64, limit=5).measure(tiny("bloom"), Runtime())
    assert metric.values["bits_per_byte"] == pytest.approx(math.log2(metric.values["ppl"]), rel=1e-9)
