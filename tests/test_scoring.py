"""`SharedContextLM` gives the log-likelihoods of lm-evaluation-harness's own `HFLM`, with less work."""

import os
import pathlib
from itertools import groupby

import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from benchmarks.eval_tasks import TASKS, load_requests
from teq import config
from teq.device.runtime import Runtime
from teq.evaluate.scoring import SharedContextLM
from teq.models.head import Head
from teq.spec import UserError

VOCAB = 300
MAX_LENGTH = 128
SENTENCES = [
    "The cat sat on the mat and looked at the door.",
    "A dog ran across the garden while the children were playing.",
    "She opened the window because the room was hot, then she closed it again.",
]


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE with merges inside words, so that a context cut inside a word tokenizes differently."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(SENTENCES * 20, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def build(family: str) -> transformers.PreTrainedModel:
    """A tiny fp32 model in which every parameter, norms and biases included, is far from its usual start."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_LENGTH,
    }
    config = {
        "opt": lambda: transformers.OPTConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            word_embed_proj_dim=16,
        ),
        "bloom": lambda: transformers.BloomConfig(vocab_size=VOCAB, hidden_size=36, n_layer=2, n_head=6),
        "llama": lambda: transformers.LlamaConfig(**sizes),
        "mistral": lambda: transformers.MistralConfig(**sizes, sliding_window=12),  # shorter than some texts
        "gemma2": lambda: transformers.Gemma2Config(
            **sizes, head_dim=8, sliding_window=12, final_logit_softcapping=2.0
        ),
        "granite": lambda: transformers.GraniteConfig(**sizes, logits_scaling=4.0),
    }[family]()
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name and name.endswith("weight") else 0.3 * noise)
    return model.eval()


def stock(model, tokenizer, batch_size=3, max_length=MAX_LENGTH) -> HFLM:
    return HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length, backend="causal"
    )


def ours(model, tokenizer, batch_size=3, max_length=MAX_LENGTH) -> SharedContextLM:
    return SharedContextLM(model, tokenizer, batch_size, max_length)


def instances(pairs) -> list[Instance]:
    return [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]


def assert_equal(found, expected, tolerance=5e-5):
    assert len(found) == len(expected)
    for (log_prob, greedy), (wanted, wanted_greedy) in zip(found, expected, strict=True):
        assert log_prob == pytest.approx(wanted, abs=tolerance)
        assert greedy == wanted_greedy


ENDINGS = [
    " and",
    " while it slept",
    " because the window was open, and the dog",
    " then left the room again",
]
CASES = {
    "many endings": [(s[:cut], e) for s in SENTENCES for cut in (11, 25, len(s)) for e in ENDINGS],
    "one ending": [(sentence, ENDINGS[i]) for i, sentence in enumerate(SENTENCES)],
    "one-token endings": [(sentence, e) for sentence in SENTENCES for e in (" a", " t", " s")],
    "ending begins another": [(SENTENCES[1], e) for e in (" it", " it was", " it was the dog", " the")],
    "duplicates": [(SENTENCES[0], e) for e in ENDINGS * 2] + [(SENTENCES[2], " a")] * 2,
    "empty context": [("", e) for e in ENDINGS],
    "contexts differ late": [
        (f"{sentence} It pleased {who}", end)
        for sentence, end in zip(SENTENCES, ENDINGS[1:], strict=True)
        for who in ("the cat", "her")
    ],
    "cut inside a word": [("The cat sat on the wi", e) for e in ("ndow again", "de mat and door", "ll")],
}
CASES["all together"] = [pair for pairs in CASES.values() for pair in pairs][::-1]


@pytest.mark.parametrize("family", ["opt", "bloom", "llama", "mistral", "gemma2", "granite"])
@pytest.mark.parametrize("case", CASES)
def test_equals_stock(family, case, tokenizer):
    model, requests = build(family), instances(CASES[case])
    expected = stock(model, tokenizer).loglikelihood(requests, disable_tqdm=True)
    lm = ours(model, tokenizer)
    assert_equal(lm.loglikelihood(requests), expected)
    assert lm.truncated == 0
    assert len({round(log_prob, 3) for log_prob, _ in expected}) > 1  # the model tells the requests apart


def test_context_cut_inside_a_word_tokenizes_otherwise(tokenizer):
    context, ending = CASES["cut inside a word"][0]
    joint = tokenizer.encode(context + ending)
    assert tokenizer.encode(context) != joint[: len(tokenizer.encode(context))]


@pytest.mark.parametrize("family", ["opt", "bloom", "llama"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_truncates_as_stock(family, batch_size, tokenizer):
    model, requests = build(family), instances(CASES["all together"])
    whole = stock(model, tokenizer).loglikelihood(requests, disable_tqdm=True)
    expected = stock(model, tokenizer, max_length=30).loglikelihood(requests, disable_tqdm=True)
    lm = ours(model, tokenizer, batch_size, max_length=30)
    assert_equal(lm.loglikelihood(requests), expected)
    lengths = [sum(map(len, lm._encode_pair(*r.args))) for r in requests if r.args[0]]
    assert lm.truncated == sum(length > 31 for length in lengths) > 0
    changed = sum(abs(a[0] - b[0]) > 1e-2 for a, b in zip(whole, expected, strict=True))
    assert 0 < changed <= lm.truncated


def test_learned_positions_up_to_the_last(tokenizer):
    """A batch whose padding would pass the position table while its real tokens end exactly there."""
    model = build("opt")
    requests = [
        (None, list(range(context, 2 * context)), [first, *range(9, 8 + length)])
        for context, length, first in ((100, 29, 3), (100, 21, 4), (90, 38, 3), (90, 26, 4))
    ]
    expected = stock(model, tokenizer)._loglikelihood_tokens(requests, disable_tqdm=True)
    assert_equal(ours(model, tokenizer, 8)._loglikelihood_tokens(requests), expected)


@pytest.mark.parametrize("family", ["opt", "bloom", "llama"])
def test_greedy_flag(family, tokenizer):
    model = build(family)
    requests, wanted = [], []
    for start in (5, 40):
        ids = list(range(start, start + 20))
        for _ in range(4):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        context, best = ids[:20], ids[20:]
        for end in (best, [*best[:3], (best[3] + 1) % VOCAB], [(best[0] + 1) % VOCAB, *best[1:]]):
            requests += [(None, context, end), (None, [*context, end[0]], end[1:])]
            wanted += [end == best, end[1:] == best[1:] and end[0] == best[0]]
    found = [greedy for _, greedy in ours(model, tokenizer)._loglikelihood_tokens(requests)]
    expected = [greedy for _, greedy in stock(model, tokenizer)._loglikelihood_tokens(requests, True)]
    assert found == expected
    assert sum(found) >= 4
    assert not all(found)
    assert [f for f, w in zip(found, wanted, strict=True) if w] == [True] * sum(wanted)


def test_rolling_equals_stock(tokenizer):
    model = build("llama")
    texts = instances([(" ".join(SENTENCES),), (SENTENCES[0],)])
    expected = stock(model, tokenizer, max_length=20).loglikelihood_rolling(texts, disable_tqdm=True)
    found = ours(model, tokenizer, max_length=20).loglikelihood_rolling(texts, disable_tqdm=True)
    assert found == pytest.approx(expected, abs=5e-5)


def test_reads_contexts_once_and_projects_only_scored_positions(tokenizer, monkeypatch):
    model = build("llama")
    lm = ours(model, tokenizer, 8)
    read, projected = [], []
    forward, logits = model.model.forward, Head.logits

    def counted(**kwargs):
        read.append(kwargs["input_ids"].shape)
        return forward(**kwargs)

    monkeypatch.setattr(model.model, "forward", counted)
    monkeypatch.setattr(Head, "logits", lambda self, x: projected.append(len(x)) or logits(self, x))
    context = list(range(2, 42))
    ends = [[first, 7, 8, 9] for first in (50, 51, 52)]
    lm._loglikelihood_tokens([(None, context, end) for end in ends] * 2)
    assert read == [(1, 49)]  # the context and each ending without its last token, in one pass
    assert sum(projected) == 1 + 3 * 3  # the context's last position predicts all three first tokens

    read.clear(), projected.clear()
    lm._loglikelihood_tokens([(None, context, [50]), (None, context[::-1], [51, 52])])
    assert read == [(2, 41)]  # contexts of one ending each: one pass
    assert sum(projected) == 3

    read.clear(), projected.clear()
    lm._loglikelihood_tokens([(None, context, end) for end in ([50], [51], [50, 52], [50, 52, 53])])
    assert read == [(1, 42)]  # the longest ending's pass answers for those that begin it
    assert sum(projected) == 3


def test_fills_the_cache_hook_in_terms_of_the_request(tokenizer):
    lm = ours(build("llama"), tokenizer)
    seen = {}

    class Hook:
        def add_partial(self, kind, text, answer):
            seen[kind, text] = answer

    lm.cache_hook = Hook()
    pairs = CASES["many endings"]
    answers = lm.loglikelihood(instances(pairs))
    assert seen == {("loglikelihood", pair): answer for pair, answer in zip(pairs, answers, strict=True)}


def test_is_silent_without_a_terminal(tokenizer, capsys):
    lm = ours(build("llama"), tokenizer)
    capsys.readouterr()
    lm.loglikelihood(instances(CASES["many endings"]))
    assert capsys.readouterr() == ("", "")


def test_halves_the_batch_when_memory_runs_out(tokenizer, monkeypatch, caplog):
    model, requests = build("opt"), instances(CASES["all together"])
    expected = stock(model, tokenizer).loglikelihood(requests, disable_tqdm=True)
    lm = ours(model, tokenizer, 16)
    forward = model.model.forward

    def limited(**kwargs):
        if kwargs["input_ids"].numel() > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(**kwargs)

    monkeypatch.setattr(model.model, "forward", limited)
    assert_equal(lm.loglikelihood(requests), expected)
    assert lm.batch_size < 16
    assert "batch size halved to 8" in caplog.text


def interrupt(lm, monkeypatch, after):
    """Let `lm` be interrupted in the batch that follows `after` finished ones; gives the batches it read."""
    original, read = lm._score, []

    def score(rows):
        read.append(
            sorted(request for wants in rows for point in wants.points.values() for request, _ in point)
        )
        if len(read) == after + 1:
            raise KeyboardInterrupt
        return original(rows)

    monkeypatch.setattr(lm, "_score", score)
    return read


@pytest.mark.parametrize("family", ["opt", "bloom", "llama"])
def test_goes_on_from_the_last_finished_batch_with_the_same_batches(family, tokenizer, monkeypatch, tmp_path):
    model, requests = build(family), instances(CASES["all together"])
    whole = SharedContextLM(model, tokenizer, 2)
    all_batches = interrupt(whole, monkeypatch, 1000)
    expected = whole.loglikelihood(requests)
    assert len(all_batches) > 6
    first = SharedContextLM(model, tokenizer, 2, partial=tmp_path)
    interrupt(first, monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        first.loglikelihood(requests)
    second = SharedContextLM(model, tokenizer, 2, partial=tmp_path)
    read = interrupt(second, monkeypatch, 1000)
    assert second.loglikelihood(requests) == expected  # to the bit
    assert read == all_batches[3:]
    # a second call of the same process is other work
    assert second.loglikelihood(requests) == expected and len(read) == 2 * len(all_batches) - 3


def test_with_another_batch_size_what_was_answered_is_kept(tokenizer, monkeypatch, tmp_path):
    model, requests = build("opt"), instances(CASES["all together"])
    expected = ours(model, tokenizer).loglikelihood(requests)
    first = SharedContextLM(model, tokenizer, 4, partial=tmp_path)
    done = interrupt(first, monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        first.loglikelihood(requests)
    second = SharedContextLM(model, tokenizer, 1, partial=tmp_path)
    read = interrupt(second, monkeypatch, 1000)
    assert_equal(second.loglikelihood(requests), expected)
    answered = {request for batch in done[:3] for request in batch}
    assert answered and not answered & {request for batch in read for request in batch}


def test_memory_that_runs_out_on_the_processor_halves_the_batch_too(tokenizer, monkeypatch):
    lm = ours(build("opt"), tokenizer)

    def failing(**_):
        raise RuntimeError(
            f"DefaultCPUAllocator: can't allocate memory: you tried to allocate {2**31} bytes."
        )

    monkeypatch.setattr(lm.model.model, "forward", failing)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        lm.loglikelihood(instances(CASES["one ending"]))
    assert lm.batch_size == 1


def test_tasks_refuse_models_that_change_the_logits(tiny):
    """Granite's are divided by a value of its configuration; here by another one."""
    (job,) = config.jobs(["model=tiny-granite", "method=fp", "evals=[lastword-python-docs]"])
    lm = tiny("granite")
    lm.model.register_forward_hook(lambda _, __, out: setattr(out, "logits", out.logits / 2))
    with pytest.raises(UserError, match="does more to its logits"):
        job.run.evals[0].measure(lm, Runtime())


def test_refuses_requests_without_continuation(tokenizer):
    with pytest.raises(ValueError, match="request 1: 2 context and 0 continuation tokens"):
        ours(build("opt"), tokenizer)._loglikelihood_tokens([(None, [3], [4]), (None, [3, 4], [])])


DATA = os.environ.get("TEQ_DATA")


@pytest.mark.data
@pytest.mark.wheel
@pytest.mark.skipif(not DATA, reason="TEQ_DATA names no folder with the evaluation sets")
@pytest.mark.parametrize("task", TASKS)
def test_real_documents_equal_stock(task):
    (job,) = config.jobs(["model=smollm2-135m"])
    try:
        folder = job.run.model.source.folder()
    except UserError as error:
        pytest.skip(f"no package index: {error}")
    requests = load_requests(task, pathlib.Path(DATA), documents=12, seed=1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    limit = model.config.max_position_embeddings
    expected = stock(model, tokenizer, 8, limit).loglikelihood(requests, disable_tqdm=True)
    found = ours(model, tokenizer, 8, limit).loglikelihood(requests)
    assert_equal(found, expected, tolerance=5e-4)
    pairs = zip(requests, expected, found, strict=True)
    for document, answers in groupby(pairs, key=lambda pair: pair[0].doc_id):
        _, wanted, scores = zip(*answers, strict=True)
        ranked = sorted((score for score, _ in wanted), reverse=True)
        if len(ranked) > 1 and ranked[0] - ranked[1] > 5e-4:
            choices = [max(range(len(s)), key=lambda i: s[i][0]) for s in (wanted, scores)]
            assert choices[0] == choices[1], document


# --- the paper's harness: lm-eval of October 2023


def laid_out(family: str) -> transformers.PreTrainedTokenizerFast:
    """A BPE tokenizer of a few words whose special tokens and spaces are those of the family's."""
    specials = {
        "opt": ["<s>", "<pad>", "</s>", "<unk>"],
        "bloom": ["<unk>", "<s>", "</s>", "<pad>"],
        "llama": ["<unk>", "<s>", "</s>"],
    }[family]
    space = "▁" if family == "llama" else "Ġ"
    merges = [*zip("tcso", "haan", strict=True), ("th", "e"), ("ca", "t"), ("sa", "t")]
    merges += [(space, word) for word in ("the", "cat", "sat", "on")]
    names = [*specials, space, *"acehnost", *("".join(pair) for pair in merges)]
    bpe = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    if family == "llama":
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bos = {"opt": "</s>", "bloom": "<s>", "llama": "<s>"}[family]
    if family != "bloom":
        number = names.index(bos)
        bpe.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [(bos, number)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos, eos_token="</s>")


def tokens_of(lm, monkeypatch, pair):
    """The tokens of context and continuation that a request becomes."""
    found = []
    monkeypatch.setattr(lm, "_loglikelihood_tokens", lambda requests, **_: found.extend(requests))
    lm.loglikelihood(instances([pair]))
    return found[0][1:]


@pytest.mark.parametrize(
    ("family", "model", "expected", "today"),
    [
        ("opt", "opt-6.7b", ([17, 21, 22], [23]), ([2, 17, 21, 22], [23])),
        ("bloom", "bloom-3b", ([17, 21, 22], [23]), ([17, 21, 22], [23])),
        ("llama", "llama-7b", ([19, 20, 21], [3, 22]), ([1, 19, 20, 21], [22])),
    ],
)
def test_the_papers_recipe_makes_the_requests_of_its_harness(family, model, expected, today, monkeypatch):
    tokenizer, request = laid_out(family), ("the cat sat", " on")
    (job,) = config.jobs([f"model={model}", "evals=[piqa,lambada_openai]"])
    task, lambada = job.run.evals
    assert (lambada.bos, lambada.pair) == (False, "joint")
    lm = SharedContextLM(build(family), tokenizer, 1, bos=task.bos, pair=task.pair)
    assert tokens_of(lm, monkeypatch, request) == expected
    assert tokens_of(ours(build(family), tokenizer), monkeypatch, request) == today


def test_a_space_at_a_contexts_end_stays_there_in_separate_tokens(monkeypatch):
    tokenizer, request = laid_out("llama"), ("the cat ", "sat")
    separate = SharedContextLM(build("llama"), tokenizer, 1, bos=False, pair="separate")
    joint = SharedContextLM(build("llama"), tokenizer, 1, bos=False)
    assert tokens_of(separate, monkeypatch, request) == ([19, 20, 3], [21])
    assert tokens_of(joint, monkeypatch, request) == ([19, 20], [21])
