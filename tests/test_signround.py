"""Learned rounding: its gradient, its training, what it refuses."""

import itertools
import pathlib

import pytest
import torch
from safetensors.torch import load_file

from teq import config
from teq.device.live_bytes import LiveBytes
from teq.device.runtime import Runtime
from teq.grid import Grid, decode, encode, extremes, fake_quant, group_params, grouped, spread
from teq.pipeline.estimate import estimate
from teq.quantizers.blockwise import quantize_blocks
from teq.quantizers.signround.rounding import RoundedLinear, Rounding
from teq.quantizers.signround.train import batches
from teq.spec import UserError
from teq.stage import NothingDone

ORACLE = pathlib.Path(__file__).parent / "oracles" / "signround.safetensors"
SIGNROUND = ["method=signround", "bits=2", "group_size=16", "signround.samples=8", "signround.length=64"]


def straight(values):
    """Rounding whose gradient is the identity."""
    return values + (values.round() - values).detach()


def by_autograd(weight, offset, shrink, grid):
    """The definition, differentiated by torch: auto-round's `quant_tensor_asym`."""
    done, start = [], 0
    for part, added in zip(grouped(weight, grid), grouped(offset, grid), strict=True):
        below, above = shrink[:, :, start : start + part.shape[1], None]
        start += part.shape[1]
        lo, hi = (bound[..., None] for bound in extremes(part))
        if grid.symmetric:
            most = torch.maximum(hi, -lo)
            scale, zero = 2 * most * above / grid.levels, torch.full_like(hi, 2 ** (grid.bits - 1))
        else:
            scale = (hi * above - lo * below) / grid.levels
            zero = straight(-lo * below / scale)
        codes = (straight(part / scale + added) + zero).clamp(0, grid.levels)
        done.append((scale * (codes - zero)).flatten(1))
    return torch.cat(done, 1)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [16, 24, -1])  # 24: the last group has 16
def test_gradient_is_autograds(size, symmetric):
    torch.manual_seed(0)
    grid = Grid(bits=3, group_size=size, symmetric=symmetric)
    rounding = Rounding(torch.randn(8, 64), None, grid)
    rounding.offset.data.uniform_(-0.4, 0.4)
    rounding.shrink.data.uniform_(0.5, 1)  # so that some codes are at an end
    x = torch.randn(2, 5, 64, requires_grad=True)
    dy = torch.randn(2, 5, 8)
    RoundedLinear.apply(x, rounding.offset, rounding.shrink, None, rounding).backward(dy)
    offset, shrink = (p.detach().clone().requires_grad_() for p in (rounding.offset, rounding.shrink))
    again = x.detach().clone().requires_grad_()
    expected = by_autograd(rounding.weight, offset, shrink, grid)
    assert torch.allclose(rounding.fake_quantized(), expected, atol=1e-6)
    torch.nn.functional.linear(again, expected).backward(dy)
    for ours, theirs in ((x, again), (rounding.offset, offset), (rounding.shrink, shrink)):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_untrained_rounding_is_plain_rounding(symmetric, dtype):
    grid = Grid(bits=3, group_size=24, symmetric=symmetric, scale_dtype=dtype)
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Rounding(weight, None, grid).fake_quantized(), fake_quant(weight, grid))


@pytest.mark.parametrize("symmetric", [False, True])
def test_it_starts_from_any_scale_and_zero(symmetric):
    grid = Grid(bits=3, group_size=16, symmetric=symmetric)
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    weight[0] = weight[0].abs()  # groups that end at zero
    scale, zero = group_params(weight, grid)
    scale, zero = scale * 0.7, zero if symmetric else (zero + 1).clamp(max=7)
    found = Rounding(weight, (scale, zero), grid)
    params = spread(scale, grid, 64), spread(zero, grid, 64)
    expected = decode(encode(weight, *params, grid), *params)
    assert torch.equal(found.params()[1], zero)
    assert torch.allclose(found.fake_quantized(), expected, atol=1e-5)


def test_a_stored_linear_is_what_the_training_computed_with():
    grid = Grid(bits=3, group_size=24, scale_dtype="float16")
    rounding = Rounding(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), None, grid)
    rounding.offset.data.uniform_(-0.5, 0.5)
    rounding.shrink.data.uniform_(0.5, 1)
    stored = rounding.quantized()
    assert torch.equal(stored.dequantize(grid), rounding.fake_quantized())
    assert torch.equal(stored.scale, stored.scale.half().float())


def test_a_group_of_zeros_stays_zero():
    grid = Grid(bits=3, group_size=16)
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    weight[:, 16:32] = 0
    rounding = Rounding(weight, None, grid)
    for _ in range(3):
        (
            RoundedLinear.apply(torch.randn(9, 64), rounding.offset, rounding.shrink, None, rounding) + 1
        ).sum().backward()
        rounding.step(0.3)
    assert not rounding.quantized().dequantize(grid)[:, 16:32].any()
    assert rounding.quantized().codes[:, :16].any()


@pytest.mark.parametrize("case", ["asym", "asym_tail", "asym_fp16"])
def test_steps_are_auto_rounds(case):
    """The golden tensors are auto-round's own, with their loop and optimizer."""
    golden = load_file(ORACLE)
    sizes = {"asym_tail": 40}
    grid = Grid(
        bits=3, group_size=sizes.get(case, 32), scale_dtype="float16" if case == "asym_fp16" else "float32"
    )
    rounding = Rounding(golden["weight"], None, grid)
    for step in range(20):
        out = RoundedLinear.apply(golden["inputs"], rounding.offset, rounding.shrink, None, rounding)
        loss = torch.nn.functional.mse_loss(out, golden["targets"])
        assert torch.isclose(loss, golden[f"{case}.losses"][step], rtol=1e-4)
        (1000 * loss).backward()
        rounding.step((1 - step / 20) / 20)
        if (name := f"{case}.{step + 1}.codes") in golden:
            ours = rounding.quantized()
            differs = (ours.codes != golden[name]).float().mean()
            assert differs <= (1e-3 if case == "asym_fp16" else 0)
            if case != "asym_fp16":
                assert torch.allclose(ours.scale, golden[f"{case}.{step + 1}.scale"], rtol=1e-5)
                assert torch.equal(ours.zero, golden[f"{case}.{step + 1}.zero"])
                assert torch.allclose(rounding.offset, golden[f"{case}.{step + 1}.value"], atol=1e-6)


def test_a_blocks_steps_are_auto_rounds():
    """Two linears trained together on batches of samples."""
    golden = load_file(ORACLE)
    grid = Grid(bits=3, group_size=32)
    first, second = (Rounding(golden[f"block.fc{i}.weight"], None, grid) for i in (1, 2))
    for step, samples in enumerate(golden["block.batches"]):
        hidden = RoundedLinear.apply(golden["block.inputs"][samples], first.offset, first.shrink, None, first)
        hidden = torch.nn.functional.silu(hidden)
        out = RoundedLinear.apply(hidden, second.offset, second.shrink, None, second)
        loss = torch.nn.functional.mse_loss(out, golden["block.targets"][samples])
        assert torch.isclose(loss, golden["block.losses"][step], rtol=1e-4)
        (1000 * loss).backward()
        for name, rounding in (("fc1", first), ("fc2", second)):
            rounding.step((1 - step / 20) / 20)
            if (key := f"block.{name}.{step + 1}.codes") in golden:
                assert torch.equal(rounding.quantized().codes, golden[key])


def test_every_sample_is_drawn_once_in_a_pass():
    drawn = list(itertools.islice(batches(10, 3, seed=0), 6))
    for part in (drawn[:3], drawn[3:]):
        flat = [i for batch in part for i in batch]
        assert len(set(flat)) == 9 and all(len(batch) == 3 for batch in part)
    assert drawn[:3] != drawn[3:]


def quantized(tiny, family, *options, partial=None, windows=None):
    lm = tiny(family)
    (job,) = config.jobs([f"model=tiny-{family}", *SIGNROUND, *options])
    return job.run.quantizer.quantize(lambda: lm, {}, Runtime(partial=partial))


@pytest.mark.parametrize(
    ("family", "search"), [("opt", "none"), ("bloom", "clip"), ("llama", "clip"), ("llama", "hessian")]
)
def test_every_block_ends_better_than_it_began(own_home, tiny, family, search):
    _, info = quantized(tiny, family, f"quant_grid.search={search}", "signround.iterations=20")
    for entry in info["signround"].values():
        assert entry["loss"][entry["kept"]] == min(entry["loss"].values()) < 0.9 * entry["loss"]["start"]


def test_what_a_step_reached_is_not_called_unreached(own_home, tiny, monkeypatch):
    """Though no token reaches it afterwards: rounded weights may route tokens to other experts."""
    from teq.quantizers.signround import train

    whole = train.measure
    monkeypatch.setattr(train, "measure", lambda *given: dict(list(whole(*given).items())[1:]))
    _, info = quantized(tiny, "llama", "signround.iterations=5")
    assert "unreached" not in info


def test_windows_in_one_batch_give_what_they_give_alone(own_home, tiny, family):
    """BLOOM's position biases are one for each sequence: a batch needs its own keywords."""
    from teq.quantizers.signround.train import BlockTrainer

    lm, grid = tiny(family), Grid(bits=2, group_size=16)
    windows = torch.randint(250, (4, 32), generator=torch.Generator().manual_seed(0))

    def check(block):
        with BlockTrainer(block, grid) as trainer:
            alone = torch.stack([trainer.loss([i]) for i in range(4)]).mean()
            assert torch.allclose(trainer.loss(range(4)), alone, rtol=1e-4)
            return {name: r.quantized() for name, r in trainer.roundings.items()}, {}

    quantize_blocks(lm.model, lm.arch, {}, windows, grid, check, "rounding", targets=True)


@pytest.mark.parametrize("search", ["none", "clip"])
def test_a_killed_training_goes_on_bit_equal(own_home, tiny, tmp_path, monkeypatch, search):
    from teq.quantizers.signround import train

    options = [f"quant_grid.search={search}", "signround.iterations=10"]
    expected, report = quantized(tiny, "llama", *options)
    original = train.BlockTrainer.loss

    def killed(self, samples):
        if self.block.folded.name.endswith(".1"):
            raise KeyboardInterrupt
        return original(self, samples)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.BlockTrainer, "loss", killed)
        quantized(tiny, "llama", *options, partial=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    resumed, again = quantized(tiny, "llama", *options, partial=tmp_path)
    assert again == report and resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


def test_blocks_that_training_makes_worse_keep_their_start(own_home, tiny):
    with pytest.raises(NothingDone, match="learned rounding made no block better"):
        quantized(tiny, "llama", "signround.lr=1000", "signround.iterations=1", "signround.batch=1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["bits=1"], "bits=1 is not allowed with signround"),
        (
            ["signround.batch=9"],
            r"signround\.batch=9 is not allowed: it must be at most signround\.samples=8",
        ),
        (["signround.iterations=0"], r"signround\.iterations=0 is not allowed"),
        (
            ["quant_grid.search=best"],
            r"quant_grid\.search='best' is not allowed: it must be one of none, clip",
        ),
    ],
)
def test_refusals(options, message):
    with pytest.raises(UserError, match=message):
        config.jobs(["model=tiny-llama", *SIGNROUND, *options])


def test_plan_predicts_its_memory(own_home):
    """What a dry run on fake tensors needs, against the tensors that live while a model is quantized."""
    config_of = "model.config={model_type: llama, vocab_size: 300, hidden_size: 128, intermediate_size: 352, "
    config_of += "num_hidden_layers: 3, num_attention_heads: 4, num_key_value_heads: 2}"
    (job,) = config.jobs(["model=tiny-llama", config_of, *SIGNROUND, "signround.iterations=4"])
    quantizer, checkpoint = job.run.quantizer, job.run.model
    predicted = estimate(quantizer, checkpoint.source.dimensions(), checkpoint.arch, "float32", "keep").bytes
    lm = checkpoint.load("float32", "cpu")
    with LiveBytes() as live:
        live.count([*lm.model.parameters(), *lm.model.buffers()])
        quantizer.quantize(lambda: lm, {}, Runtime())
    assert predicted == pytest.approx(live.peak, rel=0.15)
