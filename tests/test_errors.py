"""The relative errors that records hold: those of the stored codes, on the inputs of the quantized prefix."""

import pytest
import torch
from tiny_jobs import run

from teq import config
from teq.device.runtime import Runtime
from teq.models.arch import blocks, linears, sites
from teq.models.fold import fold
from teq.quantizers.errors import defined, output_errors, read_back, weight_error
from teq.quantizers.quantized import Quantized, linear_from

SIGNROUND = ["signround.samples=4", "signround.length=48", "signround.iterations=15", "signround.lr=0.01"]
METHODS = {
    "gptq": ["method=gptq", "gptq.samples=4", "gptq.length=48"],
    "searched": ["method=rtn", "quant_grid.search=clip", "gptq.samples=4", "gptq.length=48"],
    "searched rows": ["method=rtn", "quant_grid.search=clip", "group_size=-1", "gptq.samples=4"],
    "signround": ["method=signround", *SIGNROUND],
}


def quantized(tiny, family, overrides):
    """The quantizer, the folded float model, the stored tensors and what the record says."""
    (job,) = config.jobs([f"model=tiny-{family}", "bits=3", "group_size=16", "gptq.length=48", *overrides])
    lm, folded, quantizer = tiny(family), tiny(family), job.run.quantizer
    generator = torch.Generator().manual_seed(0)
    scales = {s.name: torch.rand(s.width, generator=generator) + 0.5 for s in sites(lm.model, lm.arch)}
    tensors, info = quantizer.quantize(lambda: lm, scales, Runtime())
    fold(sites(folded.model, folded.arch), scales)
    return quantizer, folded, tensors, info


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_output_errors_are_those_of_the_stored_codes_on_the_calibration_inputs(tiny, family, method):
    """Against whole-model forward passes, the blocks before quantized and the block itself not."""
    quantizer, plain, tensors, info = quantized(tiny, family, METHODS[method])
    windows, found = quantizer.windows(plain.tokenizer), dict(info["output_error"])
    for block_name, block in blocks(plain.model, plain.arch).items():
        inside = linears(block_name, block)
        inputs = {name: [] for name in inside}
        handles = [
            linear.register_forward_pre_hook(
                lambda _, args, seen=inputs[name]: seen.append(args[0].flatten(0, -2))
            )
            for name, linear in inside.items()
        ]
        for window in windows:
            plain.model(window[None])
        for handle in handles:
            handle.remove()
        for name, linear in inside.items():
            weight, read = linear.weight, torch.cat(inputs[name])
            codes = linear_from(tensors, name, quantizer.grid, tuple(weight.shape))
            lost = (weight - codes.dequantize(quantizer.grid)) @ read.T
            expected = (lost.square().sum() / (weight @ read.T).square().sum()).item()
            assert found.pop(name) == pytest.approx(expected, rel=1e-3), name
        for name, linear in inside.items():
            codes = linear_from(tensors, name, quantizer.grid, tuple(linear.weight.shape))
            linear.weight.copy_(codes.dequantize(quantizer.grid))
    assert not found and "weight_error" not in info


@torch.no_grad()
def test_without_text_the_error_is_the_weights(tiny):
    quantizer, folded, tensors, info = quantized(tiny, "llama", ["method=rtn"])
    assert "output_error" not in info and len(info["weight_error"]) == info["linears"]
    for name, error in info["weight_error"].items():
        weight = folded.model.get_parameter(f"{name}.weight")
        lost = weight - linear_from(tensors, name, quantizer.grid, tuple(weight.shape)).dequantize(
            quantizer.grid
        )
        assert error == pytest.approx((lost.square().sum() / weight.square().sum()).item(), rel=1e-4)


def test_white_inputs_give_the_weights_error():
    """`tr(E G E^T)` with G a multiple of the identity; a linear that puts out nothing has no error."""
    grid = quantizer_grid()
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    codes = torch.full((8, 32), 3, dtype=torch.uint8)
    q = Quantized(codes, torch.ones(8, 2), torch.full((8, 2), 3.0))  # all zero: the whole weight is lost
    white = {("a",): 5 * torch.eye(32)}
    assert read_back(output_errors({"a": weight}, {"a": q}, white, grid)) == {"a": 1.0}
    assert weight_error(q.dequantize(grid) - weight, weight) == 1
    dead = {("a",): torch.zeros(32, 32)}
    assert defined(read_back(output_errors({"a": weight}, {"a": q}, dead, grid))) == {}


def quantizer_grid():
    (job,) = config.jobs(["model=tiny-llama", "method=rtn", "bits=3", "group_size=16"])
    return job.run.quantizer.grid


@pytest.mark.parametrize(("method", "kind"), [("rtn", "weight_error"), ("gptq", "output_error")])
def test_a_record_holds_them_for_every_linear(own_home, method, kind):
    quantization = run(own_home, f"method={method}").data["quantization"]
    assert len(quantization[kind]) == quantization["linears"]
    assert all(0 < error < 1 for error in quantization[kind].values())


def test_a_block_that_older_code_finished_has_none(tiny, tmp_path, monkeypatch):
    """The work of an interrupted run is gone on with; its errors are of the blocks that follow."""
    from teq.files.resume import BlockFiles

    (job,) = config.jobs(["model=tiny-llama", "bits=3", "group_size=16", *METHODS["gptq"]])
    quantizer, read = job.run.quantizer, BlockFiles.read

    def older(self, index):
        found = read(self, index)
        if found is not None and index == 0:
            for entry in found[1].values():
                entry.pop("output_error", None)
        return found

    monkeypatch.setattr(BlockFiles, "read", older)
    quantizer.quantize(lambda: tiny("llama"), {}, Runtime(partial=tmp_path))
    _, info = quantizer.quantize(lambda: tiny("llama"), {}, Runtime(partial=tmp_path))
    assert 0 < len(info["output_error"]) < info["linears"]
    assert all("output_error" not in entry for entry in info["gptq"].values())
