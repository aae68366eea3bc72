"""Experts as linears: the function of the stock model, and what quantization makes of them."""

import pytest
import torch
from tiny_jobs import GPTQ
from transformers import AutoConfig, AutoModelForCausalLM

from teq import config
from teq.device.runtime import Runtime
from teq.models import arch
from teq.models.fold import fold, folded_tensors, one_of_each_kind
from teq.models.layers import Experts, read_shares, with_linears
from teq.models.synthetic import skeleton
from teq.pipeline import estimate
from teq.quantizers.quantized import linear_from, restore, round_to_nearest
from teq.spec import UserError
from teq.verbs.run import checked_jobs

SMALL = [*GPTQ, "group_size=16", "signround.samples=8", "signround.length=48", "signround.iterations=5"]


def job_of(*overrides):
    (job,) = config.jobs(["model=tiny-qwen3_moe", *SMALL, *overrides])
    return job


def tokens(rows=2, length=40):
    return torch.randint(258, (rows, length), generator=torch.Generator().manual_seed(0))


def test_experts_as_linears_compute_what_fused_ones_do():
    """In training too: routing weights and inputs have the gradients of transformers' own loop."""
    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_config(job_of().run.model.source.dimensions()).eval()
    for parameter in stock.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    stock.config._experts_implementation = "eager"
    fused = stock.model.layers[0].mlp
    read, upstream = torch.randn(2, 2, 40, 64).unbind()
    read.requires_grad_()

    def gradients():
        out = fused(read)
        return out.detach(), torch.autograd.grad(out, [read, fused.gate.weight], upstream)

    logits, expected = stock(tokens()).logits, gradients()
    assert not isinstance(fused.experts, Experts)
    assert isinstance(with_linears(stock).model.layers[0].mlp.experts, Experts)
    torch.testing.assert_close(stock(tokens()).logits, logits)
    torch.testing.assert_close(gradients(), expected)


def test_experts_of_another_layout_stay_fused_and_are_refused_by_name():
    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_local_experts": 4}
    model = skeleton(AutoConfig.for_model("gpt_oss", vocab_size=258, **sizes))
    assert not any(isinstance(module, Experts) for module in model.modules())
    with pytest.raises(UserError, match=r"is refused: no rule .*mlp\.experts\.gate_up_proj \[4, 64, 96\]"):
        arch.blocks(model, job_of("model/arch=llama").run.model.arch)


def test_dense_and_expert_blocks_are_both_probed_and_their_sites_hold_each_reader(tiny):
    lm = tiny("qwen3_moe")
    assert one_of_each_kind(lm.model, lm.arch) == [0, 1]
    found = {site.name: site for site in arch.sites(lm.model, lm.arch)}
    experts, dense = (found[f"model.layers.{i}.post_attention_layernorm"] for i in (0, 1))
    pair = "model.layers.0.mlp.experts.{}.gate_proj", "model.layers.0.mlp.experts.{}.up_proj"
    assert [list(group) for group in experts.groups] == [[n.format(i) for n in pair] for i in range(4)]
    assert list(experts.kept) == ["model.layers.0.mlp.gate"] and not experts.routed
    assert [list(g) for g in dense.groups] == [[f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up")]]
    assert dense.kept == {}
    every = arch.sites(lm.model, tiny("qwen3_moe", "float32", "sites=all").arch)
    assert [site.name.split(".")[4] for site in every if site.routed] == ["experts"] * 4


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_router_is_folded_and_stored_and_never_quantized(own_home, tiny, method):
    job, lm = job_of(f"method={method}"), tiny("qwen3_moe")
    generator, router = torch.Generator().manual_seed(0), "model.layers.0.mlp.gate"
    found = arch.sites(lm.model, lm.arch)
    scales = {site.name: torch.rand(site.width, generator=generator) + 0.5 for site in found}
    tensors, info = job.run.quantizer.quantize(lambda: tiny("qwen3_moe"), scales, Runtime())
    assert f"{router}/codes" not in tensors
    assert info["linears"] == sum(name.endswith("/codes") for name in tensors) == 8 + 12 + 3
    s = scales["model.layers.0.post_attention_layernorm"]
    plain = lm.model.get_parameter(f"{router}.weight").clone()
    assert torch.equal(tensors[f"param/{router}.weight"], plain * s)
    other = tiny("qwen3_moe").model
    restore(other, tensors, job.run.quantizer.grid)
    fold(found, folded_tensors(scales))
    assert torch.equal(other.get_parameter(f"{router}.weight"), lm.model.get_parameter(f"{router}.weight"))


def without_tokens(lm):
    """Route no token to expert 3: one expert a token, and the last's logit is the mean of the others'."""
    gate = lm.model.model.layers[0].mlp.gate
    gate.top_k = 1
    gate.weight[3] = gate.weight[:3].mean(0)
    return lm


@pytest.mark.parametrize(
    "method",
    [
        ["method=gptq"],
        ["method=gptq", "gptq.true_sequential=true"],
        ["method=rtn", "quant_grid.search=clip"],
        ["method=signround"],
        ["method=awq"],
        ["method=smoothquant", "sites=all"],
        ["method=awq", "sites=all"],
    ],
    ids=" ".join,
)
def test_an_expert_without_tokens_is_rounded_counted_and_said(own_home, tiny, caplog, method):
    job = job_of(*method)
    sites_option = [option for option in method if option.startswith("sites")]
    lm = without_tokens(tiny("qwen3_moe", "float32", *sites_option))
    exact = {name: p.clone() for name, p in lm.model.named_parameters()}
    scales, _ = job.run.transform.fit(lambda: lm, Runtime(), lambda *_: None)
    tensors, info = job.run.quantizer.quantize(lambda: lm, folded_tensors(scales), Runtime())
    last = [f"model.layers.0.mlp.experts.3.{n}_proj" for n in ("gate", "up", "down")]
    assert info["linears"] == 23
    if not scales:  # the quantizer is what calibrates
        assert sorted(info["unreached"]) == sorted(last)
        assert "no calibration token reached 3 of 23 linears" in caplog.text
        for name in last:
            weight, grid = exact[f"{name}.weight"], job.run.quantizer.grid
            found = linear_from(tensors, name, grid, tuple(weight.shape))
            assert torch.equal(found.codes, round_to_nearest(weight, grid).codes)
    for name in last:
        source = f"{name.rpartition('.')[0]}.up_proj"
        assert source not in scales or (scales[source] == 1).all()
        assert f"clip/{name}" not in scales
    restore(lm.model, tensors, job.run.quantizer.grid)
    assert lm.model(tokens()).logits.isfinite().all()


@pytest.mark.parametrize(("before", "after"), [(3, 0), (0, 3)])
def test_experts_that_other_tokens_reach_once_attention_is_quantized(own_home, tiny, before, after):
    """All tokens go to one expert, to another as soon as the attention's output projection has changed."""
    lm = tiny("qwen3_moe")
    block = lm.model.model.layers[0]
    projection = block.self_attn.o_proj.weight.clone()
    forward = block.mlp.gate.forward

    def route(hidden):
        logits, weights, _ = forward(hidden)
        chosen = before if torch.equal(block.self_attn.o_proj.weight, projection) else after
        return logits, weights[:, :1], torch.full((len(hidden), 1), chosen)

    block.mlp.gate.forward = route
    job = job_of("method=gptq", "gptq.true_sequential=true")
    _, info = job.run.quantizer.quantize(lambda: lm, {}, Runtime())
    idle = [name for name in info["unreached"] if name.startswith("model.layers.0.")]
    assert {int(name.split(".")[5]) for name in idle} == {0, 1, 2, 3} - {after}
    assert len(idle) == 9 and info["linears"] == 23


def test_overhead_of_replaced_layers_is_refused(tiny):
    for name in ("qwen3_moe", "gpt2"):
        (job,) = config.jobs([f"model=tiny-{name}", "method=fp", "evals=[overhead]"])
        with pytest.raises(UserError, match="overhead compares with the model as transformers makes it"):
            job.run.evals[0].measure(tiny(name), Runtime())


def test_scales_of_an_expert_without_tokens_stay_while_the_others_train(own_home, tiny, tmp_path, caplog):
    """With a state of the training that is saved, in which the optimizer has moments of all scales."""
    job = job_of("method=teq", "sites=all", "train.steps=2", "train.length=48")
    lm = without_tokens(tiny("qwen3_moe", "float32", "sites=all"))
    scales, _ = job.run.transform.fit(lambda: lm, Runtime(partial=tmp_path), lambda *_: None)
    moved = {
        name: bool((scales[name] != scales[f"start/{name}"]).any()) for name in scales if "/" not in name
    }
    assert [name for name, is_moved in moved.items() if not is_moved] == [
        "model.layers.0.mlp.experts.3.up_proj"
    ]
    assert "the scales of 1 of" in caplog.text


def test_the_last_stage_tunes_experts_of_which_one_has_no_tokens(own_home, tiny, tmp_path):
    job = job_of("method=rtn", "finetune=scales+norms", "tune.steps=12", "tune.length=48", "tune.lr=0.002")
    tensors, _ = job.run.quantizer.quantize(lambda: without_tokens(tiny("qwen3_moe")), {}, Runtime())
    tuned, info = job.run.finetune.tune(
        lambda: without_tokens(tiny("qwen3_moe")), tensors, Runtime(partial=tmp_path)
    )
    assert (tmp_path / "tuning.safetensors").exists() and info["kept"]
    for i, moves in enumerate([True, True, True, False]):
        name = f"model.layers.0.mlp.experts.{i}.down_proj/scale"
        assert torch.equal(tuned[name], tensors[name]) != moves


def test_an_input_correction_of_experts_is_refused_before_the_run(no_weights):
    chosen = ["model=tiny-qwen3_moe", "method=gptq", "evals=[python-docs]"]
    with pytest.raises(
        UserError, match=r"gptq\.input_correction=0\.5 is not allowed for a model with experts"
    ):
        checked_jobs([*chosen, "gptq.input_correction=0.5"])
    assert checked_jobs(chosen)
    with pytest.raises(UserError, match="is not allowed for a model with experts"):
        checked_jobs(["-m", *chosen, "gptq.input_correction=0,0.5"])


def test_what_gptq_takes_is_predicted_from_the_block_of_experts_wherever_it_is():
    """A dense block has fewer linears; experts read a share of the tokens, so it takes more operations."""
    quantizer, predicted = job_of("method=gptq").run.quantizer, {}
    for dense in ([], [0], [1], [0, 1]):
        sizes = job_of().run.model.source.dimensions()
        sizes.mlp_only_layers = dense
        predicted[*dense] = quantizer.estimate(estimate.outline(sizes, "float32", job_of().run.model.arch))
    assert predicted[0,] == predicted[1,]
    assert predicted[0, 1].flops > predicted[()].flops == predicted[0,].flops


def test_linears_of_experts_read_their_share_of_the_tokens(tiny):
    lm = tiny("qwen3_moe")
    sparse, dense = lm.model.model.layers
    shares = read_shares(sparse, lm.model.config)
    assert len(shares) == 12 and set(shares.values()) == {0.5}
    assert read_shares(dense, lm.model.config) == {}
