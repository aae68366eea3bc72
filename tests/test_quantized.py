"""The stored form of a quantized model."""

import pytest
from tiny_jobs import GPTQ, QUICK, run

from teq import config
from teq.device.runtime import Runtime
from teq.pipeline.store import Store
from teq.quantizers.quantized import restore, shapes


@pytest.mark.parametrize("method", ["rtn", "gptq", "teq", "teq+gptq"])
def test_metric_recomputed_from_the_stored_file_alone_is_bit_equal(own_home, method):
    finished = run(own_home, f"method={method}", "dtype=bfloat16")
    (job,) = config.jobs([*QUICK, *GPTQ, f"method={method}", "dtype=bfloat16"])
    from safetensors.torch import load_file

    lm = job.run.model.load("bfloat16", "cpu")
    stage = finished.data["stages"]["weights"]["key"]
    restore(
        lm.model,
        load_file(own_home / "store" / "weights" / stage / "data.safetensors"),
        job.run.quantizer.grid,
    )
    metric = job.run.evals[0].measure(lm, Runtime())
    assert metric.values["ppl"] == finished.metrics["python-docs"]["values"]["ppl"]
    assert (metric.arrays["window_loss"] == finished.array("python-docs", "window_loss")).all()


def test_codes_are_stored_with_their_bits_packed(own_home):
    from safetensors.torch import load_file

    finished = run(own_home, "method=rtn", "bits=3")
    stage = own_home / "store" / "weights" / finished.data["stages"]["weights"]["key"]
    tensors = load_file(stage / "data.safetensors")
    assert tensors["model.layers.0.mlp.down_proj/codes"].numel() == 64 * 160 * 3 // 8


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_record_says_how_many_bits_a_weight_takes(own_home, method):
    finished = run(own_home, f"method={method}", "bits=3", "group_size=48")
    (job,) = config.jobs([*QUICK, *GPTQ, f"method={method}", "bits=3", "group_size=48"])
    model, grid = job.run.model.load("float32", "cpu").model, job.run.quantizer.grid
    linears = {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if ".layers." in name and hasattr(module, "in_features")
    }
    store = Store(own_home / "store")
    tensors = store.find("weights", finished.data["stages"]["weights"]["key"]).tensors()
    assert shapes(tensors, grid) == linears
    assert finished.data["quantization"]["bits_per_weight"] == grid.bits_per_weight(linears.values()) > 3.5
    assert finished.weights == {"bits_per_weight": grid.bits_per_weight(linears.values())}
    floats = run(own_home, "method=fp", "dtype=bfloat16")
    assert floats.weights == {"bits_per_weight": 16}
