"""Scales and norms trained end to end after quantization: against autograd, and against its own promises."""

import dataclasses
import functools
import shutil

import pytest
import torch
from torch.nn import functional

import run as entry
from teq import config, load, record
from teq.__main__ import main
from teq.config.composition import merged
from teq.data.embedded import CALIBRATION_END
from teq.device.live_bytes import LiveBytes
from teq.device.runtime import Runtime
from teq.finetune.linear import DequantizedLinear
from teq.finetune.settings import Finetune
from teq.finetune.train import finetune
from teq.finetune.tuned import normalizations
from teq.grid import Grid, decode, spread
from teq.models.arch import blocks
from teq.models.checkpoint import LM
from teq.models.head import Head
from teq.models.loss import CHUNK, ChunkedDivergence, causal_loss
from teq.models.synthetic import architecture
from teq.pipeline import estimate
from teq.quantizers.quantized import restore
from teq.quantizers.rtn import Rtn
from teq.report import match
from teq.stage import Diverged, NothingDone
from teq.verbs.export import found_run

GRID = Grid(bits=3, group_size=16)
KERNEL = {"grid": GRID, "norms": True, "steps": 6, "lr": 1e-2, "batch": 2, "divergence": True}
TINY = ["ppl.limit=2", "ppl.context=64", "evals=[python-docs]", "group_size=16", "tune.length=48"]


def tokens(rows=22, length=48):
    """Windows in which a token tells the next one, so that there is something to learn."""
    start = torch.randint(200, (rows, 1), generator=torch.Generator().manual_seed(1))
    return (start + 3 * torch.arange(length)) % 200 + 2


@functools.cache
def rounded(family):
    """What RTN stores of a tiny model."""
    (job,) = config.jobs([f"model=tiny-{family}"])
    return Rtn(grid=GRID).quantize(lambda: job.run.model.load("float32", "cpu"), {}, Runtime())[0]


def tuned(lm, family, **changes):
    """The tensors that a tuning of RTN's weights gives, and what it says of them."""
    return finetune(lm.model, lm.arch, rounded(family), tokens(), **(KERNEL | changes))


@pytest.mark.parametrize("columns", [48, 40])
@pytest.mark.parametrize("ordered", [False, True])
def test_the_closed_gradient_is_autograds_through_dequantization(columns, ordered):
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(8, (12, columns), generator=draw, dtype=torch.uint8)
    groups = GRID.group_count(columns)
    zero = torch.randint(8, (12, groups), generator=draw).float()
    scale = torch.rand(12, groups, generator=draw).add_(0.1).requires_grad_()
    x = torch.randn(2, 5, columns, generator=draw, requires_grad=True)
    bias, up = torch.randn(12, generator=draw), torch.randn(2, 5, 12, generator=draw)
    order = torch.randperm(columns, generator=draw)
    g_idx = (torch.arange(columns) // 16)[order] if ordered else None
    weight = decode(
        codes.double(), spread(scale.double(), GRID, columns, g_idx), spread(zero, GRID, columns, g_idx)
    )
    plain = functional.linear(x.double(), weight, bias.double())
    expected = torch.autograd.grad(plain, (x, scale), up.double())
    ours = DequantizedLinear.apply(x, scale, codes, zero, g_idx, bias, GRID)
    gradients = torch.autograd.grad(ours, (x, scale), up)
    torch.testing.assert_close(ours.double(), plain, rtol=1e-5, atol=1e-5)
    for gradient, exact in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, CHUNK, 2 * CHUNK + 45])
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("biased", [True, False])
def test_the_chunked_divergence_is_torchs(count, biased, cap):
    draw = torch.Generator().manual_seed(0)
    hidden, reference = (
        torch.randn(count, 24, generator=draw, requires_grad=True),
        torch.randn(count, 24, generator=draw),
    )
    weight, bias = torch.randn(500, 24, generator=draw), torch.randn(500, generator=draw) if biased else None
    exact = (functional.linear(h, weight, bias) for h in (hidden, reference))
    ours, theirs = ((z if cap is None else cap * (z / cap).tanh()).log_softmax(-1) for z in exact)
    plain = functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    (expected,) = torch.autograd.grad(3 * plain, hidden)
    chunked = ChunkedDivergence.apply(hidden, Head(weight, bias, cap=cap), reference)
    (gradient,) = torch.autograd.grad(3 * chunked, hidden)
    torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("divergence", [True, False])
def test_tuning_moves_scales_and_norms_and_no_code_and_what_is_stored_has_the_lower_loss(
    tiny, family, divergence
):
    before = rounded(family)
    after, info = tuned(tiny(family), family, divergence=divergence, steps=12)
    assert info["kept"] and info["held_out"]["after"] < info["held_out"]["before"]
    assert sum(info["loss"][-3:]) < sum(info["loss"][:3])
    assert info["tokens"] == 12 * 2 * 48 and info["held_out"]["windows"] == 2
    norms = {
        f"param/{n}.{key}"
        for n, m in normalizations(tiny(family).model, tiny(family).arch).items()
        for key, _ in m.named_parameters()
    }
    assert after.keys() == before.keys() | norms and len(norms) == {"llama": 5}.get(family, 10)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]) == (
            not name.endswith("/scale")
        ), name
    if not divergence:  # the loss that was measured is that of the stored model
        lm = tiny(family)
        restore(lm.model, after, GRID)
        assert causal_loss(lm.model, tokens()[:2]).item() == pytest.approx(
            info["held_out"]["after"], rel=1e-5
        )


def test_only_scales_move_where_only_they_are_to(tiny):
    after, _ = tuned(tiny("opt"), "opt", norms=False)
    assert after.keys() == rounded("opt").keys()
    moved = after["model.decoder.layers.0.fc1/scale"] / rounded("opt")["model.decoder.layers.0.fc1/scale"]
    assert 0 < (moved - 1).abs().max() < 6 * 1e-2  # Adam: at most about the rate a step


def test_scales_are_trained_as_the_file_holds_them(tiny):
    grid = dataclasses.replace(GRID, scale_dtype="float16")
    lm = tiny("llama")
    start, _ = Rtn(grid=grid).quantize(lambda: lm, {}, Runtime())
    after, info = finetune(
        lm.model, lm.arch, start, tokens(), **(KERNEL | {"grid": grid, "divergence": False})
    )
    scales = [tensor for name, tensor in after.items() if name.endswith("/scale")]
    assert info["kept"] and all(torch.equal(scale, scale.half().float()) for scale in scales)
    lm = tiny("llama")
    restore(lm.model, after, grid)
    assert causal_loss(lm.model, tokens()[:2]).item() == pytest.approx(info["held_out"]["after"], rel=1e-5)


def test_a_tuning_of_act_order_weights_sees_the_very_model_that_is_stored(tiny):
    (job,) = config.jobs(
        ["model=tiny-llama", "method=gptq-ao", "gptq.samples=4", "gptq.length=48", "group_size=16"]
    )
    start, _ = job.run.quantizer.quantize_on(tiny("llama"), {}, tokens(4))
    assert any(name.endswith("/g_idx") for name in start)
    lm = tiny("llama")
    after, info = finetune(lm.model, lm.arch, start, tokens(), **(KERNEL | {"divergence": False}))
    lm = tiny("llama")
    restore(lm.model, after, GRID)
    assert info["kept"]
    assert causal_loss(lm.model, tokens()[:2]).item() == pytest.approx(info["held_out"]["after"], rel=1e-5)


@pytest.mark.parametrize("change", [{"steps": 0}, {"lr": 30.0}], ids=str)
def test_without_a_lower_loss_on_held_out_text_the_start_is_kept(tiny, caplog, change):
    after, info = tuned(tiny("llama"), "llama", **change)
    assert not info["kept"] and "tuning is left out" in caplog.text
    assert after.keys() == rounded("llama").keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in rounded("llama").items())


def test_a_rate_that_moves_nothing_is_an_error(tiny):
    with pytest.raises(NothingDone, match=r"raise tune\.lr"):
        tuned(tiny("llama"), "llama", lr=0.0)


def test_no_strategy_changes_a_result(tiny, family):
    (kept, first), *others = (
        tuned(tiny(family), family, steps=3, runtime=Runtime(strategy=s)) for s in Finetune.strategies
    )
    for tensors, info in others:
        assert info["loss"] == first["loss"] and info["held_out"] == first["held_out"]
        assert all(torch.equal(kept[name], tensors[name]) for name in kept)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_killed_tuning_resumes_to_the_very_same_tensors(tiny, tmp_path, error):
    expected, whole = tuned(tiny("opt"), "opt")
    steps = []

    def fail(step, _):
        if step == 3:
            raise error

    runtime = Runtime(partial=tmp_path / "partial")
    with pytest.raises(error):  # whatever strategy it had
        tuned(tiny("opt"), "opt", runtime=dataclasses.replace(runtime, strategy="stream"), on_step=fail)
    after, info = tuned(tiny("opt"), "opt", runtime=runtime, on_step=lambda step, _: steps.append(step))
    assert steps == [4, 5] and info == whole
    assert all(torch.equal(after[name], tensor) for name, tensor in expected.items())


def test_a_loss_that_is_not_finite_stops_with_the_step_and_keeps_the_scales(tiny):
    lm = tiny("llama")

    def poison(step, _):
        if step == 1:
            lm.model.model.embed_tokens.weight.data.fill_(float("nan"))

    with pytest.raises(Diverged, match=r"at step 2; lower tune\.lr") as caught:
        tuned(lm, "llama", on_step=poison)
    scales = [tensor for name, tensor in caught.value.tensors.items() if name.endswith("/scale")]
    assert scales and all(torch.isfinite(scale).all() for scale in scales)


@pytest.mark.parametrize(
    ("family", "strategy"),
    [("opt", "keep"), ("bloom", "checkpoint"), ("llama", "checkpoint"), ("llama", "offload")],
)
def test_the_memory_of_a_step_is_predicted(family, strategy):
    """And the weights that the codes replace are gone."""
    (job,) = config.jobs([f"model=tiny-{family}", "method=rtn", "finetune=scales+norms", *TINY])
    stage, wanted = job.run.finetune, job.run.model.source.dimensions()
    wanted.num_hidden_layers = 7
    predicted = estimate.estimate(stage, wanted, job.run.model.arch, "float32", strategy)
    model = architecture(wanted).eval().requires_grad_(False)
    waiting = blocks(model, job.run.model.arch).values() if strategy == "offload" else ()
    elsewhere = {p for block in waiting for p in block.parameters()}
    live = LiveBytes()
    live.count(t for t in (*model.parameters(), *model.buffers()) if t not in elsewhere)
    weights = live.live
    with live:
        stage.dry_run(LM(model, None, job.run.model.arch, ""), strategy)
    assert predicted.flops == live.flops
    assert predicted.bytes == pytest.approx(live.peak, rel=0.15)
    if strategy != "offload":
        assert live.live < weights


def test_tuning_is_planned(no_weights, capsys):
    argv = ["model=tiny-llama", "method=rtn", "finetune=scales", *TINY]
    assert main(["plan", *argv]) == 0
    cells = [
        line.split("|")[5] for line in capsys.readouterr().out.splitlines() if line.startswith("| tuned")
    ]
    assert [strategy.strip() for strategy in cells] == ["keep (picked)", "checkpoint", "stream"]


def test_the_held_out_text_is_in_no_step(tiny):
    (job,) = config.jobs(["model=tiny-llama", "method=rtn", "finetune=scales", "tune.steps=4000"])
    tokenizer = job.run.model.tokenizer()
    windows = job.run.finetune.windows(tokenizer)
    assert len(windows.unique(dim=0)) == len(windows) < 4000 and windows.numel() <= CALIBRATION_END
    quantizer = config.jobs(["model=tiny-llama", "method=gptq", "gptq.length=256", "gptq.samples=8"])[
        0
    ].run.quantizer
    read = {tuple(window.tolist()) for window in quantizer.windows(tokenizer)}
    assert not read & {tuple(window.tolist()) for window in job.run.finetune.windows(tokenizer)}
    (_, info), (_, other) = (
        finetune(lm.model, lm.arch, rounded("llama"), text, **(KERNEL | {"steps": 12}))
        for lm, text in (
            (tiny("llama"), tokens()),
            (tiny("llama"), torch.cat([tokens()[:2] * 0, tokens()[2:]])),
        )
    )
    assert info["loss"] == other["loss"] and info["held_out"] != other["held_out"]


def test_a_run_is_tuned_recorded_evaluated_and_exported_with_the_tuned_weights(own_home, family, capsys):
    argv = [f"model=tiny-{family}", "method=rtn", *TINY, "tune.steps=10", "tune.lr=5e-3"]
    assert entry.main(argv) == 0 and entry.main([*argv, "finetune=scales+norms"]) == 0
    plain, data = (one.data for one in sorted(record.load(own_home / "records"), key=lambda r: len(r.data)))
    assert "finetune" not in plain and "tuned" not in plain["stages"] and "finetune" not in plain["run"]
    assert data["stages"]["weights"]["cached"] and data["run"]["finetune"]["parts"] == "scales+norms"
    assert len(data["finetune"]["loss"]) == 10 and data["text"]["finetune"]["name"] == "python-docs"
    assert data["stages"]["weights"]["key"] == plain["stages"]["weights"]["key"]
    assert data["finetune"]["kept"]
    before, after = (d["metrics"]["python-docs"]["values"]["ppl"] for d in (plain, data))
    said = capsys.readouterr()
    assert before != after and "finetune=scales+norms" in said.err and "| scales+norms |" in said.out
    _, artefact, _ = found_run([data["id"]])
    assert artefact.folder.parent.name == "tuned" and artefact.digest == data["stages"]["tuned"]["digest"]
    model, _ = load(data["id"])
    (job,) = config.jobs([*argv, "finetune=scales+norms"])
    lm = LM(model, job.run.model.tokenizer(), job.run.model.arch, "")
    assert job.run.evals[0].measure(lm, Runtime()).values["ppl"] == pytest.approx(after, rel=1e-6)
    assert entry.main([*argv, "finetune=scales+norms"]) == 0
    assert len(record.load(own_home / "records")) == 2


def test_the_options_of_tuning(capsys):
    def of(*given):
        return config.jobs(["model=tiny-llama", *given])[0].run

    assert of("method=rtn").finetune is None and of("method=rtn", "finetune=none") == of("method=rtn")
    assert of("method=rtn", "finetune=none").key() == of("method=rtn").key()
    three = [of("method=rtn", *more) for more in ([], ["finetune=scales"], ["finetune=scales+norms"])]
    assert len({each.key() for each in three}) == 3
    assert len({match.group_key(each.plain()) for each in three}) == 3  # none stands for another in a table
    assert of("method=rtn", "finetune=scales", "tune.loss=lm", "recipe=paper").finetune.loss == "lm"
    for given, said in (
        (["method=fp", "finetune=scales"], "finetune=scales has no effect on method=fp"),
        (["method=rtn", "finetune=all"], "finetune=all is not allowed: it must be one of none, scales"),
        (
            ["method=rtn", "finetune=scales", "tune.loss=mse"],
            "tune.loss='mse' is not allowed: it must be one",
        ),
        (["method=rtn", "finetune=scales", "tune.length=9999"], "tune.length=9999 is not allowed"),
    ):
        assert entry.main(["model=tiny-llama", *given]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
        assert said in line


def test_a_method_may_bring_its_tuning(tmp_path, monkeypatch):
    for name in ("conf", "experiments"):
        shutil.copytree(config.folder(name), tmp_path / name)
    plain = (tmp_path / "conf" / "method" / "rtn.yaml").read_text()
    (tmp_path / "conf" / "method" / "rtn-tuned.yaml").write_text(
        f"{plain}  - _self_\nfinetune: scales+norms\n"
    )
    monkeypatch.setenv("TEQ_ROOT", str(tmp_path))
    (job,) = config.jobs(["model=tiny-llama", "method=rtn-tuned"])
    assert (
        job.run.finetune.parts == "scales+norms"
        and job.run.key() != config.jobs(["model=tiny-llama", "method=rtn"])[0].run.key()
    )
    assert config.job(*merged(["model=tiny-llama", "method=rtn-tuned"])).run == job.run
    (job,) = config.jobs(["model=tiny-llama", "method=rtn-tuned", "finetune=none"])
    assert job.run.finetune is None
