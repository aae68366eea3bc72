"""GPTQ over a model, block by block."""

import pytest
import torch
from tiny_jobs import GPTQ, QUICK

from teq import config
from teq.data import texts as corpora
from teq.data.texts import Calibration
from teq.device.live_bytes import LiveBytes
from teq.device.runtime import Runtime
from teq.grid import Grid
from teq.models.arch import sites
from teq.quantizers import blockwise
from teq.quantizers.gptq import blocks
from teq.quantizers.gptq.settings import Gptq
from teq.quantizers.gptq.solver import Hessian
from teq.stage import NothingDone


def test_gptq_that_equals_rounding_is_an_error(own_home, tiny, monkeypatch):
    from teq.quantizers.gptq import solver

    lm = tiny("llama")
    (job,) = config.jobs([*QUICK, *GPTQ, "method=gptq"])
    monkeypatch.setattr(solver.Hessian, "mean", lambda self: torch.eye(self.total.shape[0]))
    with pytest.raises(NothingDone, match="GPTQ's codes equal plain rounding's"):
        job.run.quantizer.quantize(lambda: lm, {}, Runtime())


@pytest.mark.parametrize("family", ["opt", "bloom", "llama", "gemma3"])
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["order=act"],
        ["order=static"],
        ["order=group"],
        ["true_sequential=true"],
        ["input_correction=1"],
        ["input_correction=1", "true_sequential=true"],
    ],
    ids=" ".join,
)
def test_gptq_blocks_equal_a_plain_walk(tiny, family, options):
    """Shared Hessians and block inputs, against a Hessian per linear from whole-model forward passes.

    So are the float model's inputs of the correction. What is compared is what was stored.
    """
    from teq.models.arch import blocks, linears
    from teq.quantizers.quantized import linear_from

    chosen = [f"gptq.{option}" for option in options]
    (job,) = config.jobs([f"model=tiny-{family}", *GPTQ, "method=gptq", "group_size=16", *chosen])
    settings, grid = job.run.quantizer, job.run.quantizer.grid
    lm, plain, exact = tiny(family), tiny(family), tiny(family)
    tensors, _ = settings.quantize(lambda: lm, {}, Runtime())
    windows = corpora.calibration(settings.calib, plain.tokenizer, settings.samples, settings.length)
    for block_name, block in blocks(plain.model, plain.arch).items():
        inside = linears(block_name, block)
        for names in [[name] for name in inside] if settings.true_sequential else [list(inside)]:
            inputs, float_inputs = (inputs_of(each.model, names, windows) for each in (plain, exact))
            for name in names:
                linear = inside[name]
                hessian = Hessian(linear.in_features, torch.device("cpu"))
                for pair in zip(inputs[name], float_inputs[name], strict=True):
                    hessian.add(*pair)
                cross = [hessian.mean_cross()] if settings.input_correction else []
                (solution,) = settings.solve([(linear.weight, hessian.mean(), *cross)])
                expected = solution.quantized.dequantize(grid)
                ours = linear_from(tensors, name, grid, tuple(linear.weight.shape)).dequantize(grid)
                assert (~torch.isclose(ours, expected, rtol=1e-3)).float().mean() < 2e-3, name
                with torch.no_grad():
                    linear.weight.copy_(expected)


def inputs_of(model, names, windows):
    """What linears read when a whole model reads windows, `[1, token, in]` each."""
    inputs = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda linear, args, seen=inputs[name]: seen.append(args[0].reshape(1, -1, linear.in_features))
        )
        for name in names
    ]
    with torch.no_grad():
        for window in windows:
            model(window[None])
    for handle in handles:
        handle.remove()
    return inputs


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_correction_leaves_the_first_block_to_gptq(tiny, family):
    """Its inputs are the float model's; with folded scales too. Behind it every linear is another."""
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(250, (4, 48), generator=generator)
    lm = tiny(family)
    scales = {s.name: torch.rand(s.width, generator=generator) + 0.5 for s in sites(lm.model, lm.arch)}
    found = {
        share: settings(input_correction=share).quantize_on(tiny(family), scales, windows)[0]
        for share in (0.0, 0.25, 1.0)
    }
    codes = [name for name in found[0.0] if name.endswith("/codes")]
    first = [name for name in codes if ".0." in name]
    assert 0 < len(first) < len(codes)
    for share in (0.25, 1.0):
        equal = [name for name in codes if torch.equal(found[share][name], found[0.0][name])]
        assert equal == first


def settings(bits=3, group_size=32, symmetric=False, **kwargs):
    grid = Grid(bits=bits, group_size=group_size, symmetric=symmetric)
    return Gptq(grid=grid, calib=Calibration(), samples=1, length=2, **kwargs)


@pytest.mark.parametrize("after", [1, 2])  # finished blocks of two
@pytest.mark.parametrize(
    "options",
    [{}, {"order": "act", "group_size": 16}, {"input_correction": 1.0}],
    ids=["plain", "act", "corrected"],
)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_gptq_goes_on_from_its_last_finished_block(tiny, tmp_path, monkeypatch, family, after, options):
    """Codes, scales, changed parameters and the report are those of an undisturbed run, to the bit."""
    chosen, solved = settings(**options), []
    lm = tiny(family)
    generator = torch.Generator().manual_seed(0)
    scales = {s.name: torch.rand(s.width, generator=generator) + 0.5 for s in sites(lm.model, lm.arch)}
    windows = torch.randint(250, (4, 48), generator=generator)
    original = blocks._quantize_block

    def counted(*args):
        result = original(*args)
        solved.append(None)
        return result

    def quantized(partial):
        solved.clear()
        return chosen.quantize_on(tiny(family), scales, windows, partial=partial)

    monkeypatch.setattr(blocks, "_quantize_block", counted)
    expected, report = quantized(None)
    assert len(solved) == 2 and any(name.startswith("param/") for name in expected)

    def interrupted(original):
        def run(*args):
            if len(solved) == after and len(list(tmp_path.iterdir())) == after:
                raise KeyboardInterrupt
            return original(*args)

        return run

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for name in ("run_block", "pass_on"):
            patch.setattr(blockwise, name, interrupted(getattr(blockwise, name)))
        quantized(tmp_path)
    resumed, again = quantized(tmp_path)
    assert len(solved) == 2 - after and again == report and list(again["gptq"]) == list(report["gptq"])
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


def test_gptq_whose_memory_ran_out_goes_on_from_its_last_finished_block(tiny, tmp_path, monkeypatch, caplog):
    original, solved = blocks._quantize_block, []
    windows = torch.randint(250, (4, 48), generator=torch.Generator().manual_seed(0))

    def fails_once(*args):
        solved.append(None)
        if len(solved) == 2:
            raise torch.OutOfMemoryError("out of memory")
        return original(*args)

    monkeypatch.setattr(Gptq, "windows", lambda *_: windows)
    monkeypatch.setattr("teq.device.memory.fits", lambda *_: True)
    monkeypatch.setattr(blocks, "_quantize_block", fails_once)
    chosen = settings(group_size=16)
    chosen.quantize(lambda: tiny("llama"), {}, Runtime(device="cuda:0", partial=tmp_path))
    assert len(solved) == 3 and "memory ran out in GPTQ" in caplog.text


@pytest.mark.parametrize(
    "options",
    [[], ["group_size=-1"], ["gptq.order=act", "group_size=16"], ["gptq.input_correction=0.5"]],
)
def test_gptqs_memory_is_within_15_percent(family, options):
    shape = ["gptq.samples=6", "gptq.length=96", "method=gptq", f"model=tiny-{family}", "evals=[python-docs]"]
    (job,) = config.jobs([*shape, *options])
    settings, lm = job.run.quantizer, job.run.model.load("float32", "cpu")
    weights = sum(p.nbytes for p in lm.model.parameters())
    predicted = settings.estimate(lm).bytes
    with LiveBytes() as live:
        settings.quantize_on(lm, {}, torch.randint(200, (6, 96)))
    assert predicted == pytest.approx(weights + live.peak, rel=0.15)


@pytest.mark.parametrize("options", [[], ["gptq.order=act"], ["gptq.input_correction=0.5"]])
def test_gptqs_operations_are_those_of_its_matrix_products(family, options):
    """Except what the counter does not know: the factorization and the columns inside a strip."""
    shape = ["gptq.samples=6", "gptq.length=96", "method=gptq", f"model=tiny-{family}", "evals=[python-docs]"]
    (job,) = config.jobs([*shape, *options])
    settings, lm = job.run.quantizer, job.run.model.load("float32", "cpu")
    foreseen = settings.estimate(lm).flops
    with LiveBytes() as live:
        settings.quantize_on(lm, {}, torch.randint(200, (6, 96)))
    assert foreseen == pytest.approx(live.flops, rel=0.3)
