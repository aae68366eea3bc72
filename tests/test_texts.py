"""Token windows: calibration in its orders, and packing."""

import random

import pytest
import torch
from conftest import documents

from teq.data import texts as corpora
from teq.models.synthetic import byte_tokenizer
from teq.spec import UserError


def settings(corpus, **values):
    return corpora.Calibration(corpus=corpus, **values)


def test_python_docs_windows_follow_one_another_and_cycle():
    tokenizer = byte_tokenizer(bos=True)
    stream = tokenizer(corpora.python_docs()).input_ids[:55_000]
    first = corpora.calibration(settings("python-docs"), tokenizer, 7, 128)
    assert first.flatten().tolist() == stream[: 7 * 128]
    third = corpora.calibration(settings("python-docs", seed=2), tokenizer, 7, 128)
    assert third.flatten().tolist() == stream[2 * 7 * 128 : 3 * 7 * 128]
    around = corpora.calibration(settings("python-docs", seed=1), tokenizer, 60, 800)
    assert around.flatten().tolist() == (stream * 2)[48_000:96_000]


@pytest.mark.parametrize("bos", [True, False])
def test_packed_documents_are_one_stream_in_a_seeded_order(write, bos):
    texts = documents(40)
    write("pile/train", text=texts)
    tokenizer = byte_tokenizer(bos)
    shuffled = list(texts)
    random.Random(3).shuffle(shuffled)
    stream = tokenizer("\n\n".join(shuffled)).input_ids
    windows = corpora.calibration(settings("pile-10k", seed=3), tokenizer, 9, 50)
    assert windows.shape == (9, 50)
    assert windows.flatten().tolist() == stream[:450]
    assert (windows == tokenizer.bos_token_id).sum() == int(bos)
    other = corpora.calibration(settings("pile-10k", seed=4), tokenizer, 9, 50)
    assert not torch.equal(windows, other)
    possible = len(stream) // 50
    assert len(corpora.calibration(settings("pile-10k"), tokenizer, possible, 50)) == possible
    with pytest.raises(
        UserError, match=f"the 40 documents of pile-10k give {possible} calibration windows of 50"
    ):
        corpora.calibration(settings("pile-10k"), tokenizer, possible + 1, 50)


def test_without_packing_short_documents_are_skipped(write):
    texts = [f"{i:03d}" * (20 if i % 4 == 0 else 2) for i in range(40)]
    write("pile/train", text=texts)
    tokenizer = byte_tokenizer(bos=True)
    found = corpora.calibration(settings("pile-10k", pack=False), tokenizer, 10, 32)
    assert (found[:, 0] == tokenizer.bos_token_id).all()
    starts = {tokenizer.decode(window[1:4]) for window in found}
    assert starts == {f"{i:03d}" for i in range(0, 40, 4)}
    with pytest.raises(
        UserError, match=r"give 10 calibration windows of 32 tokens, 11 are needed \(calib.pack=false"
    ):
        corpora.calibration(settings("pile-10k", pack=False), tokenizer, 11, 32)


def test_nobody_calibrates_on_a_test_set():
    with pytest.raises(UserError, match=r"calib.corpus='wikitext2' is not allowed.*python-docs, pile-10k"):
        settings("wikitext2")
