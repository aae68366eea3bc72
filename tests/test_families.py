"""Every family of conf/model/arch: block walks and methods on a tiny model of it."""

import pytest
import torch

from teq import config
from teq.device.runtime import Runtime
from teq.models import arch, fold
from teq.models.arch import families
from teq.models.blocks import block_inputs, first_inputs, run_block
from teq.quantizers.quantized import restore
from teq.spec import UserError
from teq.verbs.run import checked_jobs

SMALL = ["bits=3", "group_size=16", "gptq.samples=4", "gptq.length=48", "train.steps=3", "train.length=48"]


def tokens_of(rows, length):
    return torch.randint(258, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", families())
def test_walking_block_by_block_is_the_models_forward(tiny, name):
    """Longer than the sliding windows: every block has the mask and the rotations of its own kind."""
    lm, outputs = tiny(name), []
    every = list(arch.blocks(lm.model, lm.arch).values())
    for block in every:
        block.register_forward_hook(lambda _, __, out: outputs.append(out))
    lm.model(tokens_of(2, 60), use_cache=False)
    expected = list(outputs)
    hidden, keywords = block_inputs(lm.model, lm.arch, tokens_of(2, 60))
    for block, kwargs, wanted in zip(every, keywords, expected, strict=True):
        hidden = run_block(block, hidden, kwargs)
        torch.testing.assert_close(hidden, wanted[0] if isinstance(wanted, tuple) else wanted)


def test_blocks_of_one_kind_share_their_keywords(tiny):
    lm = tiny("gemma3")  # sliding, full, sliding
    _, (first, full, last) = first_inputs(lm.model, lm.arch, tokens_of(2, 60))
    assert first["attention_mask"] is last["attention_mask"]
    assert first["attention_mask"] is not full["attention_mask"]
    assert not torch.equal(first["position_embeddings"][0], full["position_embeddings"][0])
    assert fold.one_of_each_kind(lm.model, lm.arch) == [0, 1]


@pytest.mark.parametrize("method", ["rtn", "gptq", "teq"])
@pytest.mark.parametrize("name", families())
def test_methods_quantize_every_linear_of_the_blocks(tiny, name, method):
    (job,) = config.jobs([f"model=tiny-{name}", f"method={method}", *SMALL])
    lm, plain, run = tiny(name), tiny(name), job.run
    scales, _ = run.transform.fit(lambda: lm, Runtime(), lambda *_: None)
    tensors, info = run.quantizer.quantize(lambda: lm, fold.folded_tensors(scales), Runtime())
    every = [each for block in arch.blocks(plain.model, plain.arch).items() for each in arch.linears(*block)]
    assert info["linears"] == len(every) == sum(key.endswith("/codes") for key in tensors)
    before = plain.model(tokens_of(2, 40)).logits
    restore(plain.model, tensors, run.quantizer.grid)
    change = (plain.model(tokens_of(2, 40)).logits - before).norm() / before.norm()
    assert 0.01 < change < 1


def test_a_wrong_site_of_a_later_kind_of_block_is_refused_by_name(tiny):
    lm = tiny("gemma3")
    lm.model.model.layers[1].self_attn.register_forward_hook(
        lambda _, __, kwargs, out: (out[0] + kwargs["hidden_states"], out[1]), with_kwargs=True
    )
    with pytest.raises(UserError, match=r"site \S*input_layernorm -> .* into block 1 "):
        fold.check_equivalence(lm.model, lm.arch)


def test_the_weight_of_a_norm_that_adds_one_folds_exactly(tiny):
    plain, gemma = tiny("llama").model.model.norm, tiny("gemma2").model.model.norm
    assert (fold.norm_offset(plain), fold.norm_offset(gemma)) == (0, 1)
    s = torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.5
    changed = fold.Folding({}, {"norm": s}).divided("norm", gemma)["norm.weight"]
    torch.testing.assert_close(1 + changed, (1 + gemma.weight) / s)

    class Squared(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(64))

        def forward(self, x):
            return x * (2 + self.weight)

    with pytest.raises(UserError, match="Squared multiplies neither by its weight nor by 1"):
        fold.norm_offset(Squared())


def test_matrices_that_no_rule_covers_are_listed_and_refused_before_the_run(no_weights):
    """Routers that no site keeps; only the floating-point model can be evaluated then."""
    for method in ("rtn", "gptq", "teq"):
        with pytest.raises(UserError) as caught:
            checked_jobs(
                ["model=tiny-qwen3_moe", "model/arch=qwen3", f"method={method}", "evals=[python-docs]"]
            )
        line = str(caught.value)
        assert "arch=qwen3 is refused" in line and "evaluate the model with method=fp" in line
        assert "mlp.gate.weight [4, 64] of Qwen3MoeTopKRouter" in line and "experts" not in line
    assert checked_jobs(["model=tiny-qwen3_moe", "model/arch=qwen3", "method=fp", "evals=[python-docs]"])


def test_a_foreign_arch_is_refused_before_the_run_with_the_known_families(no_weights):
    with pytest.raises(
        UserError, match=r"looks for blocks at 'transformer\.h'.*model/arch=bloom\|falcon\|.*\|opt"
    ):
        checked_jobs(["model=tiny-llama", "model/arch=bloom", "method=rtn", "evals=[python-docs]"])
    with pytest.raises(
        UserError, match=r"arch=gemma2 names the source 'pre_feedforward_layernorm', which the"
    ):
        checked_jobs(["model=tiny-llama", "model/arch=gemma2", "method=rtn", "evals=[python-docs]"])
