"""What a GPU asks of a run, kept without one: see `cuda_double` for what stands in and how it differs.

Whole runs, from the command line to the record, on tensors that say they are on cuda:0: nothing uses a device
before it is initialized, no devices are mixed, no stream is read from too early, the results are a CPU's to
the bit, and the host waits for the device no more than it must. Not carried: the compiled fake quantization,
because the stand-in has no compiler (see test_fake_quant.py), and how much memory is used (see test_gpu.py).
"""

import contextlib
import json
import pathlib
import tempfile
from types import SimpleNamespace

import cuda_double
import pytest
import torch
from cuda_double import Cuda, OnCuda, Race
from safetensors.torch import load_file

import run as entry
from teq import record
from teq.device import offload
from teq.evaluate import lastword, scoring
from teq.pipeline import cost
from teq.quantizers.gptq import solver
from teq.transforms.teq import fake_quant
from teq.transforms.teq.settings import HELD_OUT
from teq.verbs import run as cli

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: test_gpu.py runs on it")
STEPS, SAMPLES, WINDOWS, BLOCKS = 3, 4, 2, 2
QUICK = [f"train.steps={STEPS}", "train.length=48", f"gptq.samples={SAMPLES}", "gptq.length=48"]
QUICK += [f"ppl.limit={WINDOWS}", "ppl.context=48", "group_size=16"]
QUICK += ["awq.samples=2", "awq.length=32", "awq.ratios=3", "smoothquant.samples=2", "smoothquant.length=32"]


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Run a command line in a cache of its own, on a CPU or on the stand-in `cuda`: what it left behind."""
    fake_quant.compiled.cache_clear()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))  # where locks of devices are

    def run(*argv, cuda=None, device="cuda", evals="python-docs"):
        home = tmp_path / f"home-{len(list(tmp_path.iterdir()))}"
        monkeypatch.setenv("TEQ_HOME", str(home))
        device = "cpu" if cuda is None else device
        with cuda or contextlib.nullcontext():
            status = entry.main([*QUICK, f"evals=[{evals}]", f"device={device}", *argv])
        assert status == 0, [note.read_text() for note in home.glob("failed/*.txt")]
        records = {
            r.data["run"]["method"]: json.loads(r.file.read_text()) for r in record.load(home / "records")
        }
        files = sorted((home / "store").glob("*/*/*.safetensors"))
        tensors = {str(file.relative_to(home)): load_file(file) for file in files}
        return SimpleNamespace(records=records, tensors=tensors)

    yield run
    fake_quant.compiled.cache_clear()


def assert_equal_to_the_bit(ran, other):
    """Metrics with their arrays, losses, histograms, errors of linears, scales and codes of all methods."""
    assert ran.records.keys() == other.records.keys() and ran.tensors.keys() == other.tensors.keys()
    for method, data in ran.records.items():
        for part in ("metrics", "training", "quantization"):
            assert data[part] == other.records[method][part], (method, part)
    for stage, tensors in ran.tensors.items():
        assert tensors.keys() == other.tensors[stage].keys()
        assert all(torch.equal(tensor, other.tensors[stage][name]) for name, tensor in tensors.items()), stage


def assert_waits_are_few(cuda, ran):
    """The host waits for the device only as often as listed here.

    A result is read back once per training step, per window and per block, by GPTQ twice per block: whether a
    factor failed, and its report. Two numbers check the model's head before a training.

    Copied to the host are every stored tensor of the weights, all scales at once, the block on which the
    sites are checked, and the four tensors of a training's state when it ends.
    """
    transforms = {method.partition("+")[0] for method in ran.records} - {"fp", "rtn", "gptq"}
    gptq = sum(method.endswith("gptq") for method in ran.records)
    rtn = sum(method in ("rtn", "teq", "awq") for method in ran.records)
    expected = {
        "evaluate.perplexity": WINDOWS * len(ran.records),
        "quantizers.gptq.solver": BLOCKS * gptq,
        "quantizers.gptq.blocks": BLOCKS * gptq,
        "quantizers.errors": rtn,  # of all linears
        "transforms.teq.train": STEPS * ("teq" in transforms),
        "models.head": 2 * ("teq" in transforms),
        "transforms.awq.search": BLOCKS * ("awq" in transforms),
    }
    assert cuda.numbers() == {module: count for module, count in expected.items() if count}
    copies = cuda.copies()
    assert copies.pop("device.memory", 0) == len(transforms) and copies.pop("models.fold", 0) <= 20 * len(
        transforms
    )
    stored = sum(len(tensors) for stage, tensors in ran.tensors.items() if stage.startswith("store/weights"))
    assert sum(copies.values()) <= stored + 4 * ("teq" in transforms)


@pytest.mark.parametrize(
    "argv",
    [
        ["-m", "model=tiny-llama", "method=fp,rtn,gptq,teq,teq+gptq"],
        ["-m", "model=tiny-opt", "method=rtn,teq+gptq"],
        ["-m", "model=tiny-bloom", "method=teq+gptq,awq"],
        ["model=tiny-llama", "method=smoothquant+gptq", "dtype=bfloat16", "gptq.order=act"],
    ],
    ids=" ".join,
)
def test_runs_give_a_cpus_bits_and_wait_no_more_than_they_must(ran, argv):
    expected, cuda = ran(*argv, "memory=keep"), Cuda()
    found = ran(*argv, "memory=keep", cuda=cuda)
    assert_equal_to_the_bit(found, expected)
    assert_waits_are_few(cuda, found)
    assert {data["machine"]["name"] for data in found.records.values()} == {cuda_double.NAME}


@pytest.mark.parametrize("memory", ["keep", "stream"])
def test_learned_rounding_and_the_last_stage_give_a_cpus_bits(ran, memory):
    argv = ["model=tiny-llama", "method=best", "signround.samples=4", "signround.length=32"]
    argv += [
        "signround.iterations=10",
        "signround.lr=0.02",
        "signround.batch=2",
        "tune.steps=3",
        "tune.length=32",
    ]
    assert_equal_to_the_bit(ran(*argv, f"memory={memory}", cuda=Cuda()), ran(*argv, "memory=keep"))


def test_input_correction_gives_a_cpus_bits(ran):
    argv = ["model=tiny-llama", "method=gptq", "gptq.input_correction=0.5", "memory=keep"]
    assert_equal_to_the_bit(ran(*argv, cuda=Cuda()), ran(*argv))


@pytest.mark.parametrize(
    ("objective", "more"), [("lm", []), ("kl", []), ("block", []), ("block", ["train.bounds_lr=0.01"])]
)
def test_every_strategy_gives_a_cpus_bits(ran, objective, more):
    argv = ["model=tiny-llama", "method=teq", "train.length=32", f"train.objective={objective}", *more]
    argv += ["train.batch=2"] if objective == "block" else []
    expected = ran(*argv, "memory=keep")
    for strategy in ("checkpoint", "offload") if objective == "lm" else ("offload",):
        cuda = Cuda()
        found = ran(*argv, f"memory={strategy}", cuda=cuda)
        for data in (found.records["teq"], expected.records["teq"]):
            said = data["training"]["strategy"], data["training"]["planned_strategy"]
            assert said == ((strategy,) * 2 if data is found.records["teq"] else ("keep", "keep"))
        for name in ("strategy", "planned_strategy"):
            found.records["teq"]["training"][name] = "keep"
        assert_equal_to_the_bit(found, expected)
        read = {module: n for module, n in cuda.numbers().items() if module.startswith("transforms.teq")}
        by_block = {"transforms.teq.block": BLOCKS * (STEPS + 2 * HELD_OUT)}  # steps, start, end
        assert read == (by_block if objective == "block" else {"transforms.teq.train": STEPS})
        assert bool(cuda.waits) is (strategy == "offload")
        by_us = [
            place for place, _ in cuda.pinned if place != "pipeline.store.tensors"
        ]  # where safetensors does
        assert by_us == ["device.offload.pin"] * (BLOCKS if strategy == "offload" else 0)


def test_a_block_is_pinned_in_one_allocation_and_keeps_its_values():
    """Of any dtypes and sizes, also none and one; a second time there is nothing to do."""
    draw = torch.Generator().manual_seed(0)
    block = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.LayerNorm(3).bfloat16())
    for name, part in (
        ("codes", torch.arange(11, dtype=torch.uint8)),
        ("one", torch.tensor(2.5)),
        ("none", torch.ones(0)),
    ):
        block.register_parameter(name, torch.nn.Parameter(part, requires_grad=False))
    block.requires_grad_(False)
    torch.nn.init.normal_(block[1].weight, generator=draw)
    before = {name: parameter.clone() for name, parameter in block.named_parameters()}
    with Cuda() as cuda:
        offload.pin(block)
        offload.pin(block)
    ((_, flat),) = cuda.pinned
    for name, parameter in block.named_parameters():
        assert parameter.dtype == before[name].dtype and torch.equal(parameter, before[name]), name
        assert parameter.untyped_storage().data_ptr() == flat.data_ptr() and parameter.is_contiguous()
        assert parameter.storage_offset() * parameter.itemsize % offload.ALIGNMENT == 0


@pytest.mark.parametrize("family", ["llama", "bloom"])  # BLOOM's position biases are made from positions
def test_a_task_reads_back_once_for_a_pass(ran, family, monkeypatch):
    few, passes = lastword.items()[:8], []
    score = scoring.SharedContextLM._score
    monkeypatch.setattr(lastword, "items", lambda: few)
    monkeypatch.setattr(scoring.SharedContextLM, "_score", lambda *args: passes.append(1) or score(*args))
    argv = [f"model=tiny-{family}", "method=fp"]
    expected, cuda = ran(*argv, evals="lastword-python-docs"), Cuda()
    passes.clear()
    assert_equal_to_the_bit(ran(*argv, evals="lastword-python-docs", cuda=cuda), expected)
    # and once to see that logits are the head's output
    assert cuda.numbers() == {"evaluate.scoring": len(passes), "models.head": 2} and not cuda.copies()


def test_another_device_is_the_current_one_and_the_one_that_is_waited_for(ran):
    cuda = Cuda(devices=2)
    ran("model=tiny-llama", "method=fp", evals="overhead", cuda=cuda, device="cuda:1")
    assert cuda.device == 1 and set(cuda.synchronized) == {1}


def test_checking_jobs_makes_no_context(monkeypatch, own_home):
    with Cuda() as cuda:
        cli.checked_jobs(["model=tiny-llama", "method=teq+gptq", "device=cuda"])
    assert not cuda.initialized


def test_the_stand_in_asks_for_what_a_gpu_asks_for():
    with Cuda(devices=2) as cuda:
        assert torch.cuda.is_available() and torch.cuda.device_count() == 2 and not cuda.initialized
        with pytest.raises(RuntimeError, match="Invalid device argument 0: did you call init"):
            torch.cuda.reset_peak_memory_stats("cuda:0")
        torch.cuda.set_device("cuda:1")
        torch.cuda.reset_peak_memory_stats("cuda:0")
        assert torch.zeros(2, device="cuda").device == torch.device("cuda:1")
        x = torch.arange(4.0).to("cuda:0")
        assert (
            isinstance(x, OnCuda) and x.is_cuda and x.to("cuda:0") is x and x.cpu().tolist() == [0, 1, 2, 3]
        )
        place = torch.tensor([1], device="cuda:0")
        for mixed in (
            lambda: x + torch.ones(4),
            lambda: x + torch.ones(4, device="cuda:1"),
            lambda: torch.ones(4).add_(x),
            lambda: torch.ones(4)[place],
            lambda: torch.cat([x, torch.ones(4)]),
            lambda: torch.add(x, x, out=torch.empty(4)),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(2, device="cuda:0", generator=torch.Generator())
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        with pytest.raises(NotImplementedError):
            x.histogram(4)
        assert (x + torch.tensor(1.0)).tolist() == [1, 2, 3, 4] and x[torch.tensor([1])].tolist() == [1]
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            torch.zeros(2, device="cuda:2")


@pytest.mark.parametrize(
    ("work", "kinds"),
    [
        (lambda x: x[0].item(), ["item"]),
        (lambda x: float(x[0]) if x[0] else 0.0, ["item"]),
        (lambda x: [1, 2][x.argmax()], ["item"]),
        (lambda x: x.tolist(), ["tolist"]),
        (lambda x: x.cpu(), ["copy"]),
        (lambda x: torch.zeros(2).copy_(x), ["copy"]),
        (lambda x: x[x > 0], ["nonzero"]),
        (lambda x: torch.where(x > 0)[0], ["nonzero"]),
        (lambda x: torch.equal(x, x), ["equal"]),
        (lambda x: torch.allclose(x, x), ["equal"]),
        (lambda x: torch.linalg.cholesky(x.diag() + 1), ["linalg"]),
        (lambda x: torch.linalg.cholesky_ex(x.diag() + 1), []),
        (lambda x: x.masked_fill_(x > 0, 1.0).addr_(x, x) if x.ndim == 2 else x.masked_fill_(x > 0, 1.0), []),
        (lambda x: x.to("cuda:0").unbind()[0].add_(1).sort(), []),
    ],
)
def test_the_stand_in_counts_what_a_host_waits_for(work, kinds):
    with Cuda() as cuda:
        x = torch.tensor([0.0, 1.0], device="cuda:0")
        work(x)
    assert [what for what, *_ in cuda.reads] == kinds


def test_a_stream_is_not_read_from_before_it_is_waited_for():
    with Cuda():
        side, x = torch.cuda.Stream("cuda:0"), torch.ones(2)
        with torch.cuda.stream(side):
            copy = x.to("cuda:0", non_blocking=True)
        with pytest.raises(Race):
            copy + 1
        torch.cuda.current_stream().wait_stream(side)
        assert (copy + 1).tolist() == [2, 2]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            copy.mul_(2)
        with pytest.raises(Race):
            copy.sum()


def test_a_read_in_the_loop_over_columns_is_found(ran, monkeypatch):
    """What the bounds are there for: a number that is read back whenever a group of columns begins."""
    original, cuda = solver.group_params, Cuda()

    def reading(block, grid):
        block.sum().item()
        return original(block, grid)

    monkeypatch.setattr(solver, "group_params", reading)
    found = ran("model=tiny-llama", "method=gptq", cuda=cuda)
    with pytest.raises(AssertionError):
        assert_waits_are_few(cuda, found)


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build", "570.86.15"),
        ("something else", None),
    ],
)
def test_the_drivers_version_is_read_where_linux_says_it(monkeypatch, line, version):
    said = f"{line}\nGCC version:  gcc version 11.4.0 (Ubuntu)"
    monkeypatch.setattr(pathlib.Path, "read_text", lambda file: said if "nvidia" in str(file) else "")
    assert cost.flags("cuda:0")["driver"] == version
