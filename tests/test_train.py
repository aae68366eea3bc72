"""TEQ against Intel's modules, against autograd, and against its own promises."""

import errno
import json
import pathlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from teq import config
from teq.data.texts import Calibration
from teq.device.runtime import STRATEGIES, Runtime
from teq.files import disk, resume
from teq.grid import Grid
from teq.models import arch
from teq.models.checkpoint import LM
from teq.models.fold import site_scales
from teq.models.loss import causal_loss
from teq.quantizers.quantized import restore
from teq.quantizers.rtn import Rtn
from teq.stage import Diverged, NothingDone
from teq.transforms.teq.settings import Teq
from teq.transforms.teq.train import initial, learning_rate
from teq.verbs.signals import Terminated

FOLDER = pathlib.Path(__file__).parent / "oracles"


def teq(**changes):
    values = {"init": "ones", "steps": 20, "lr": 0.01, "batch": 1, "length": 48}
    values |= {
        "grid": Grid(bits=3, group_size=16),
        "parameter": "clip",
        "profile": "paper",
        "calib": Calibration(),
    }
    return Teq(**{**values, **changes})


@pytest.fixture
def oracle(family):
    """The model, tokens and golden results of neural-compressor's modules for one family."""
    file = FOLDER / f"teq_{family}.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        values = json.loads(opened.metadata()["config"])
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    prefix = "weights/"
    weights = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    model.eval().requires_grad_(False)
    return model, family_arch(family), tensors


def family_arch(family):
    (job,) = config.jobs([f"model=tiny-{family}"])
    return job.run.model.arch


def test_losses_scales_and_logits_equal_neural_compressors(oracle):
    model, family, tensors = oracle
    torch.testing.assert_close(
        model(tensors["tokens"][:1]).logits, tensors["logits_fp"], rtol=1e-4, atol=1e-5
    )
    trained, info = teq().train_on(model, family, tensors["tokens"])
    torch.testing.assert_close(torch.tensor(info["loss"]), tensors["losses"], rtol=1e-5, atol=0)
    expected = {name.removeprefix("scales/"): t for name, t in tensors.items() if name.startswith("scales/")}
    scales = site_scales(trained)
    assert scales.keys() == expected.keys()
    for name, s in scales.items():
        torch.testing.assert_close(s, expected[name], rtol=1e-5, atol=1e-6)
    lm = LM(model, None, family, "oracle")
    stored, _ = Rtn(grid=teq().grid).quantize(lambda: lm, scales, Runtime())
    restore(model, stored, teq().grid)
    torch.testing.assert_close(
        model(tensors["tokens"][:1]).logits, tensors["logits_quantized"], rtol=1e-4, atol=1e-4
    )


def test_zero_steps_from_ones_is_rounding(tiny, family):
    lm = tiny(family)
    trained, _ = teq(steps=0).train_on(lm.model, lm.arch, torch.zeros(1, 48, dtype=torch.long))
    rtn = Rtn(grid=Grid(bits=3, group_size=16))
    plain, _ = rtn.quantize(lambda: lm, {}, Runtime())
    through, _ = rtn.quantize(lambda: lm, site_scales(trained), Runtime())
    for name in plain:
        assert torch.equal(plain[name], through[name]), name


def test_training_sees_the_very_model_that_is_stored(tiny, family):
    """The last forward pass of training and the folded, stored, restored model have the same loss."""
    lm = tiny(family)
    tokens = torch.randint(258, (4, 48), generator=torch.Generator().manual_seed(1))
    trained, info = teq(steps=4, lr=1e-6).train_on(lm.model, lm.arch, tokens)
    stored, _ = Rtn(grid=teq().grid).quantize(lambda: lm, site_scales(trained), Runtime())
    restore(lm.model, stored, teq().grid)
    assert causal_loss(lm.model, tokens[3:]).item() == pytest.approx(info["loss"][3], rel=1e-4)


def test_no_strategy_changes_a_loss(tiny, family):
    lm = tiny(family)
    tokens = torch.randint(258, (3, 48), generator=torch.Generator().manual_seed(1))
    (kept, first), *others = (
        teq(steps=3).train_on(lm.model, lm.arch, tokens, Runtime(strategy=s)) for s in STRATEGIES
    )
    for scales, info in others:
        assert info["loss"] == first["loss"]
        assert all(torch.equal(kept[name], scales[name]) for name in kept)


@pytest.mark.parametrize("parameter", ["clip", "log"])
@pytest.mark.parametrize("init", ["ones", "inv_sqrt"])
def test_training_moves_every_scale_and_leaves_the_model_alone(tiny, init, parameter):
    lm = tiny("llama")
    before = {name: p.clone() for name, p in lm.model.named_parameters()}
    window = torch.randint(258, (1, 48), generator=torch.Generator().manual_seed(1))
    settings = teq(steps=3, lr=3e-2, init=init, parameter=parameter)
    trained, info = settings.train_on(lm.model, lm.arch, window.expand(3, -1))
    for name in info["sites"]:
        moved = (trained[name] - trained[f"start/{name}"]).abs()
        assert (moved > 0).float().mean() > 0.95 and moved.max() < 0.2  # Adam: at most about lr a step
    assert all(torch.equal(p, before[name]) for name, p in lm.model.named_parameters())
    assert not any("forward" in vars(module) for module in lm.model.modules())
    assert all((s > 0).all() for s in site_scales(trained).values())


def test_inverse_square_root_start(tiny):
    lm = tiny("llama")
    site = arch.sites(lm.model, lm.arch)[0]
    with torch.no_grad():
        for target in site.targets.values():
            target.weight[:, 5] = 0
    start = initial(site, "inv_sqrt")
    largest = torch.cat([t.weight for t in site.targets.values()]).abs().amax(0)
    assert start[5] == 1
    torch.testing.assert_close(start[6], 1 / largest[6].sqrt())


def test_learning_rates():
    paper = [learning_rate(k, steps=4, lr=1.0) for k in range(4)]
    assert paper == [1.0, 0.75, 0.5, 0.25]
    inc = [learning_rate(k, steps=40, lr=1.0, profile="inc") for k in range(40)]
    assert inc[:3] == [0.0, 0.5, 1.0]
    assert inc[-1] == pytest.approx(1 / 38)


def test_profile_inc_trains_with_dropout():
    (job,) = config.jobs(["model=tiny-opt"])
    lm = job.run.model.load("float32", "cpu")
    assert lm.model.config.dropout > 0
    tokens = torch.randint(258, (2, 48), generator=torch.Generator().manual_seed(1))
    losses = {
        profile: teq(steps=2, profile=profile).train_on(lm.model, lm.arch, tokens)[1]["loss"]
        for profile in ("paper", "inc")
    }
    assert losses["paper"][0] != losses["inc"][0]
    assert not lm.model.training


def test_dead_site_is_an_error(tiny):
    lm = tiny("llama")
    block = lm.model.model.layers[1]
    with torch.no_grad():
        block.mlp.gate_proj.weight.zero_()
        block.mlp.up_proj.weight.zero_()
    with pytest.raises(NothingDone, match=r"layers\.1\.post_attention_layernorm never moved"):
        tokens = torch.randint(258, (2, 48), generator=torch.Generator().manual_seed(1))
        teq(steps=2).train_on(lm.model, lm.arch, tokens)


def test_infinite_loss_stops_with_the_step_and_keeps_the_scales(tiny):
    lm = tiny("llama")
    tokens = torch.randint(258, (3, 48), generator=torch.Generator().manual_seed(1))

    def poison(step, _):
        if step == 1:
            with torch.no_grad():
                lm.model.lm_head.weight.fill_(float("nan"))

    with pytest.raises(Diverged, match="at step 2") as caught:
        teq(steps=3).train_on(lm.model, lm.arch, tokens, on_step=poison)
    assert any(name.startswith("best/") for name in caught.value.tensors)
    assert all(torch.isfinite(s).all() for s in caught.value.tensors.values())


def six_windows():
    return torch.randint(258, (6, 48), generator=torch.Generator().manual_seed(1))


def steps_of(settings, lm, partial):
    """The steps that a training makes, its result, and its loss curve."""
    steps = []
    runtime = Runtime(partial=partial)
    scales, info = settings.train_on(lm.model, lm.arch, six_windows(), runtime, lambda k, _: steps.append(k))
    return steps, scales, info["loss"]


@pytest.mark.parametrize("profile", ["paper", "inc"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, Terminated, ValueError, MemoryError])
def test_a_training_that_any_exception_ends_goes_on_to_the_very_same_scales(tiny, tmp_path, profile, error):
    lm, settings = tiny("opt"), teq(steps=6, profile=profile)

    def fail(step, _):
        if step == 3:
            raise error

    _, expected, whole = steps_of(settings, lm, None)
    with pytest.raises(error):
        settings.train_on(lm.model, lm.arch, six_windows(), Runtime(partial=tmp_path / "partial"), fail)
    steps, resumed, losses = steps_of(settings, lm, tmp_path / "partial")
    assert steps == [4, 5] and losses == whole
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    # until it is stored the result is worth its state: whoever comes here again makes no step
    steps, again, losses = steps_of(settings, lm, tmp_path / "partial")
    assert steps == [] and losses == whole
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_an_interruption_inside_adams_update_leaves_the_step_before(tiny, tmp_path, monkeypatch):
    """Some parameters have moved, others not: such a state must not be saved."""
    lm, settings = tiny("llama"), teq(steps=6)
    _, expected, whole = steps_of(settings, lm, None)
    calls, original = [], torch.optim.Adam.step

    def half(self):
        calls.append(None)
        if len(calls) == 4:
            first = self.param_groups[0]["params"][0]
            first.data += 1
            self.state[first]["exp_avg"] += 1
            raise KeyboardInterrupt
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", half)
        with pytest.raises(KeyboardInterrupt):
            steps_of(settings, lm, tmp_path)
    steps, resumed, losses = steps_of(settings, lm, tmp_path)
    assert steps == [3, 4, 5] and losses == whole
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_a_state_that_cannot_be_saved_is_a_warning_once_and_no_end(tiny, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(resume, "SECONDS", 0)
    lm, settings, original = tiny("llama"), teq(steps=6), disk.save_tensors

    def full(file, *_):
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    monkeypatch.setattr(disk, "save_tensors", full)
    steps, _, _ = steps_of(settings, lm, tmp_path)
    assert steps == [0, 1, 2, 3, 4, 5] and list(tmp_path.iterdir()) == []
    (warning,) = [line for line in caplog.messages if "cannot be saved" in line]
    assert "the state of the training" in warning and "No space left" in warning
    monkeypatch.setattr(disk, "save_tensors", original)
    steps_of(settings, lm, tmp_path)
    assert steps_of(settings, lm, tmp_path)[0] == []


def test_an_interruption_while_the_state_is_saved_leaves_the_last_one(tiny, tmp_path, monkeypatch):
    lm, settings, original = tiny("llama"), teq(steps=6), disk.save_tensors
    monkeypatch.setattr(resume, "SECONDS", 0)
    saves = []

    def interrupted(file, *rest):
        saves.append(file)
        original(file, *rest)
        if len(saves) >= 3:  # the third save, and the one that its own end asks for
            file.write_bytes(file.read_bytes()[:100])
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(disk, "save_tensors", interrupted)
        with pytest.raises(KeyboardInterrupt):
            steps_of(settings, lm, tmp_path)
    assert len(saves) == 4 and [file.name for file in tmp_path.iterdir()] == ["training.safetensors"]
    assert steps_of(settings, lm, tmp_path)[0] == [2, 3, 4, 5]


def test_damaged_state_of_an_interrupted_training_is_left_aside(tiny, tmp_path, caplog):
    lm = tiny("llama")
    (tmp_path / "training.safetensors").write_bytes(b"half a fi")
    steps, _, _ = steps_of(teq(steps=6), lm, tmp_path)
    assert steps == [0, 1, 2, 3, 4, 5] and "training starts anew" in caplog.text
