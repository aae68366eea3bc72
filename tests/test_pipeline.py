"""The chain: what is shared, what is cached, what is stored is what is evaluated, and no silent no-op."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

from teq import config, record
from teq.data import texts as corpora
from teq.device import memory
from teq.device.runtime import Runtime, resolve
from teq.evaluate.perplexity import Perplexity
from teq.grid import Grid
from teq.models.checkpoint import Checkpoint
from teq.pipeline import run as pipeline
from teq.pipeline.loaded import LoadedModel
from teq.pipeline.store import Store
from teq.quantizers.quantized import restore
from teq.quantizers.rtn import Rtn
from teq.spec import UserError
from teq.stage import Diverged, NothingDone
from teq.transforms.teq.settings import Teq
from teq.verbs import run as cli

QUICK = ["model=tiny-llama", "train.steps=2", "ppl.limit=2", "ppl.context=64", "evals=[python-docs]"]
GPTQ = ["gptq.samples=4", "gptq.length=64"]


def run(home, *overrides, **changes):
    (job,) = config.jobs([*QUICK, *GPTQ, *overrides])
    spec = dataclasses.replace(job.run, **changes)
    store = Store(home / "store")
    return pipeline.run(spec, store, home, Runtime(device="cpu"), None)


def cached(finished):
    return {name: stage["cached"] for name, stage in finished.data["stages"].items()}


def test_teq_and_teq_gptq_train_once(own_home):
    first = run(own_home, "method=teq")
    second = run(own_home, "method=teq+gptq")
    assert cached(first) == {"scales": False, "weights": False, "python-docs": False}
    assert cached(second) == {"scales": True, "weights": False, "python-docs": False}
    assert first.data["stages"]["scales"]["key"] == second.data["stages"]["scales"]["key"]
    assert first.id != second.id


def test_the_baseline_does_not_depend_on_the_grid(own_home):
    first = run(own_home, "method=fp", "bits=3")
    second = run(own_home, "method=fp", "bits=4", "group_size=-1")
    assert first.id == second.id and first.file == second.file


def test_rerun_computes_and_loads_nothing(own_home, monkeypatch):
    first = run(own_home, "method=teq+gptq")

    def never(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(LoadedModel, "pristine", never)
    second = run(own_home, "method=teq+gptq")
    assert second.data == first.data  # a record is written once


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


def test_record_holds_what_tables_need(own_home):
    finished = run(own_home, "method=teq", "train.steps=3")
    data = finished.data
    assert data["run"]["transform"]["steps"] == 3 and len(data["training"]["loss"]) == 3
    assert len(data["training"]["scales"]) == 4
    site = data["training"]["scales"]["model.layers.0.input_layernorm"]
    assert sum(site["s"]["counts"]) == site["channels"] == 64
    assert data["metrics"]["python-docs"]["info"]["windows"] == 2
    assert len(data["metrics"]["python-docs"]["info"]["tokens_sha256"]) == 64
    assert data["stages"]["scales"]["cost"]["seconds"] > 0
    assert data["stages"]["scales"]["cost"]["machine"]["versions"]["torch"].startswith("2.")
    assert {"sources", "commit", "dirty"} == data["code"].keys()
    assert json.loads(finished.file.read_text()) == data


def test_record_holds_what_can_move_a_number_and_is_in_no_key(own_home):
    finished = run(own_home, "method=rtn", "evals=[python-docs,lastword-python-docs]")
    flags = finished.data["stages"]["weights"]["cost"]["machine"]["flags"]
    assert flags["deterministic"] is False and flags["matmul_precision"] == "highest" and flags["cpu"]
    assert finished.metrics["python-docs"]["info"]["attention"] == "sdpa"
    assert finished.metrics["lastword-python-docs"]["info"]["batch_size"] == 8
    assert {len(stage["digest"]) for stage in finished.data["stages"].values()} == {16}


def test_records_as_a_frame(own_home):
    for method in ("fp", "rtn"):
        run(own_home, f"method={method}")
    table = record.frame(record.load(own_home / "records"))
    assert list(table["method"]) == ["fp", "rtn"] and table["bits"].tolist()[1] == 3
    assert table["python-docs.ppl"].notna().all() and (table["seconds.python-docs"] > 0).all()


def test_broken_and_foreign_records_never_hide_the_others(own_home, caplog):
    finished = run(own_home, "method=fp")
    folder = finished.file.parent
    (folder / "a.json").write_text("{")
    (folder / "b.json").write_text(json.dumps({**finished.data, "schema": 0}))
    (folder / "c.json").write_text(json.dumps({"schema": record.SCHEMA}))
    assert [r.id for r in record.load(folder)] == [finished.id]
    assert all(name in caplog.text for name in ("a.json", "b.json", "c.json", "schema 0"))


def test_rounding_that_changes_nothing_is_an_error(own_home, tiny):
    lm = tiny("llama")
    grid = Grid(bits=8, group_size=64)
    with torch.no_grad():
        for parameter in lm.model.parameters():
            if parameter.ndim == 2:
                parameter.fill_(0)
    with pytest.raises(NothingDone, match="rounding changed no weight"):
        Rtn(grid=grid).quantize(lambda: lm, {}, Runtime())


def test_gptq_that_equals_rounding_is_an_error(own_home, tiny, monkeypatch):
    from teq.quantizers.gptq import solver

    lm = tiny("llama")
    (job,) = config.jobs([*QUICK, *GPTQ, "method=gptq"])
    monkeypatch.setattr(solver.Hessian, "mean", lambda self: torch.eye(self.total.shape[0]))
    with pytest.raises(NothingDone, match="GPTQ's codes equal plain rounding's"):
        job.run.quantizer.quantize(lambda: lm, {}, Runtime())


@pytest.mark.parametrize(
    "options",
    [[], ["act_order"], ["act_order", "static_groups"], ["true_sequential"]],
    ids=" ".join,
)
def test_gptq_blocks_equal_a_plain_walk(tiny, family, options):
    """Shared Hessians and block inputs, against a Hessian per linear from whole-model forward passes; what is
    compared is what was stored.
    """
    from teq.data import texts as corpora
    from teq.models.arch import blocks, linears
    from teq.quantizers.gptq.solver import Hessian
    from teq.quantizers.quantized import linear_from

    chosen = [f"gptq.{option}=true" for option in options]
    (job,) = config.jobs([f"model=tiny-{family}", *GPTQ, "method=gptq", "group_size=16", *chosen])
    settings, grid = job.run.quantizer, job.run.quantizer.grid
    lm, plain = tiny(family), tiny(family)
    tensors, _ = settings.quantize(lambda: lm, {}, Runtime())
    windows = corpora.calibration(settings.calib, plain.tokenizer, settings.samples, settings.length)
    for block_name, block in blocks(plain.model, plain.arch).items():
        inside = linears(block_name, block)
        for names in [[name] for name in inside] if settings.true_sequential else [list(inside)]:
            inputs = {name: [] for name in names}
            handles = [
                inside[name].register_forward_pre_hook(
                    lambda _, args, seen=inputs[name]: seen.append(args[0])
                )
                for name in names
            ]
            with torch.no_grad():
                for window in windows:
                    plain.model(window[None])
            for handle in handles:
                handle.remove()
            for name in names:
                linear = inside[name]
                hessian = Hessian(linear.in_features, torch.device("cpu"))
                for batch in inputs[name]:
                    hessian.add(batch.reshape(1, -1, linear.in_features))
                expected = settings.solve([(linear.weight, hessian.mean())])[0].quantized.dequantize(grid)
                ours = linear_from(tensors, name, grid, tuple(linear.weight.shape)).dequantize(grid)
                assert (~torch.isclose(ours, expected, rtol=1e-3)).float().mean() < 2e-3, name
                with torch.no_grad():
                    linear.weight.copy_(expected)


@pytest.mark.parametrize("stage", ["quantize", "measure"])
def test_a_device_that_cannot_hold_the_model_says_what_to_do_and_keeps_the_scales(
    own_home, monkeypatch, stage
):
    (job,) = config.jobs([*QUICK, "method=teq", "train.steps=2"])

    def full(*_):
        raise torch.OutOfMemoryError("20 GB more were asked for")

    owner = type(job.run.quantizer if stage == "quantize" else job.run.evals[0])
    with monkeypatch.context() as patched:
        patched.setattr(owner, stage, full)
        guard = memory.explained
        patched.setattr(memory, "explained", lambda doing, _: guard(doing, "cuda:0"))
        with pytest.raises(
            UserError, match=r"the memory of cuda:0 ran out while .* device=cpu goes on from it"
        ):
            run(own_home, "method=teq", "train.steps=2")
    assert cached(run(own_home, "method=teq", "train.steps=2"))["scales"]


def test_divergence_keeps_the_scales_and_stores_no_stage(own_home, monkeypatch):
    def diverge(*_):
        raise Diverged("training stopped: the loss is nan at step 7", {"site": torch.ones(3)})

    monkeypatch.setattr(Teq, "fit", diverge)
    with pytest.raises(Diverged, match=r"at step 7; the scales so far are in .*\.safetensors"):
        run(own_home, "method=teq")
    assert len(list((own_home / "failed").glob("*.safetensors"))) == 1
    assert not [p for p in (own_home / "store" / "scales").iterdir() if p.is_dir()]


def test_edited_artefact_is_found_and_made_again(own_home, caplog):
    finished = run(own_home, "method=rtn")
    weights = own_home / "store" / "weights" / finished.data["stages"]["weights"]["key"] / "data.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    again = run(own_home, "method=rtn", "ppl.limit=1")
    assert "does not match its digest" in caplog.text and "computed again" in caplog.text
    assert cached(again) == {"scales": True, "weights": False, "python-docs": False}


def changed_result(monkeypatch, owner, name, change):
    """From now on `owner.name` gives what `change` makes of its result."""
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **options: change(original(*args, **options)))


def test_another_result_makes_another_record_and_says_so_the_same_one_keeps_its_record(
    own_home, monkeypatch, caplog
):
    first = run(own_home, "method=rtn")
    shutil.rmtree(own_home / "store")
    assert run(own_home, "method=rtn").file == first.file and "with other results" not in caplog.text
    shutil.rmtree(own_home / "store")
    (job,) = config.jobs([*QUICK, "method=rtn"])

    def higher(metric):
        return dataclasses.replace(metric, values={"ppl": metric.values["ppl"] + 1})

    changed_result(monkeypatch, type(job.run.evals[0]), "measure", higher)
    second = run(own_home, "method=rtn")
    assert second.id == first.id and second.file != first.file and first.file.is_file()
    values = [one.metrics["python-docs"]["values"]["ppl"] for one in (first, second)]
    assert values[1] == values[0] + 1
    assert f"{first.id}: computed again, with other results than in {first.file.name}" in caplog.text
    assert run(own_home, "method=rtn").file == second.file  # what the store holds decides


def results(home, finished):
    """By stage of a record: the digests of its result and of those it was made from, in the store."""
    found = {}
    for name, stage in finished.data["stages"].items():
        folder = home / "store" / (name if name in ("scales", "weights") else "metrics") / stage["key"]
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["result"] == stage["digest"], name
        found[name] = manifest["result"], manifest["reads"]
    return found


@pytest.mark.parametrize("gone", [["scales"], ["scales", "weights"], ["weights"]], ids=" ".join)
def test_a_record_never_mixes_results_of_other_scales_with_metrics(own_home, monkeypatch, gone):
    """What is deleted is made anew, with another result, by another run or for a record that is missing."""
    first = run(own_home, "method=teq")
    for stage in gone:
        shutil.rmtree(own_home / "store" / stage)
    owner, name = (Teq, "fit") if "scales" in gone else (Rtn, "quantize")

    def uneven(made):
        tensors = {
            key: t * torch.linspace(1, 2, t.shape[-1]) for key, t in made[0].items() if t.is_floating_point()
        }
        return made[0] | tensors, made[1]

    changed_result(monkeypatch, owner, name, uneven)
    if gone == ["scales"]:
        run(own_home, "method=teq+gptq")  # shares the scales
    else:
        first.file.unlink()
    again = run(own_home, "method=teq")
    found = results(own_home, again)
    assert found["weights"][1] == {"scales": found["scales"][0]}
    assert found["python-docs"][1] == {"weights": found["weights"][0]}
    before = {name: stage["digest"] for name, stage in first.data["stages"].items()}
    changed = {name for name in found if found[name][0] != before[name]}
    assert changed >= {"weights", "python-docs"} and ("scales" in changed) == ("scales" in gone)


def test_nor_with_a_metric_that_was_made_before_the_scales_were_made_anew(own_home, monkeypatch):
    """A second evaluation reads the weights that are there; only the record asks for the scales again."""
    run(own_home, "method=teq")
    shutil.rmtree(own_home / "store" / "scales")

    def uneven(made):
        return {key: t * torch.linspace(1, 2, t.shape[-1]) for key, t in made[0].items()}, made[1]

    changed_result(monkeypatch, Teq, "fit", uneven)
    again = run(own_home, "method=teq", "evals=[python-docs,lastword-python-docs]", "tasks.limit=2")
    found = results(own_home, again)
    assert found["weights"][1] == {"scales": found["scales"][0]}
    for name in ("python-docs", "lastword-python-docs"):
        assert found[name][1] == {"weights": found["weights"][0]}, name


@pytest.mark.parametrize(
    "gone", ["scales", "weights", "weights/*/data.safetensors", "scales/*/data.safetensors"]
)
def test_what_was_pruned_is_not_made_again_for_what_is_there(own_home, monkeypatch, gone):
    first = run(own_home, "method=teq+gptq")
    for path in (own_home / "store").glob(gone):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "load", lambda *_: pytest.fail("a model was loaded"))
        assert run(own_home, "method=teq+gptq").file == first.file
        if "data" in gone:  # the manifests still tell a new record what it needs
            first.file.unlink()
            again = run(own_home, "method=teq+gptq")
            assert again.file == first.file and again.data["training"] == first.data["training"]


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny LLaMA in a folder, and what overwrites it with the weights of a seed."""
    from teq.models.synthetic import build, byte_tokenizer

    (job,) = config.jobs(["model=tiny-llama"])
    source, folder = job.run.model.source, tmp_path / "checkpoint"

    def write(seed):
        build(dataclasses.replace(source, seed=seed)).save_pretrained(folder)
        byte_tokenizer(source.bos).save_pretrained(folder)

    write(0)
    return folder, write


def test_a_checkpoint_edited_under_a_run_ends_it_in_one_line_and_files_nothing(
    own_home, monkeypatch, checkpoint, capsys
):
    import run as entry

    folder, write = checkpoint
    original = Rtn.quantize

    def edited_meanwhile(*args):
        write(1)
        return original(*args)

    monkeypatch.setattr(Rtn, "quantize", edited_meanwhile)
    argv = [*QUICK, f"model.path={folder}", "method=rtn"]
    assert entry.main(argv) == 1
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("failed: model=")]
    assert "the weights of model=tiny-llama changed while the run was under way" in line
    assert not list((own_home / "records").glob("*")) and not (own_home / "store" / "metrics").is_dir()
    weights = own_home / "store" / "weights"
    assert not [path for path in weights.iterdir() if path.is_dir()]
    monkeypatch.setattr(Rtn, "quantize", original)
    assert entry.main(argv) == 0


def test_code_edited_under_a_run_is_not_what_its_record_names(own_home, tmp_path):
    """The solver is imported when its stage begins, after a training that it may be edited under."""
    root, copy = config.ROOT, tmp_path / "project"
    for name in ("teq", "conf", "experiments"):
        shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", str(copy), "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "as it was"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    code = """
import sys
from teq import config
from teq.pipeline import run as pipeline
from teq.pipeline.store import Store
from teq.device.runtime import Runtime
solver = config.ROOT / "teq" / "quantizers" / "gptq" / "solver.py"

class Edit:
    def step(self, step, loss):
        assert "teq.quantizers.gptq.solver" not in sys.modules
        solver.write_text(solver.read_text() + "# edited\\n")

    def finish(self, finished):
        pass

(job,) = config.jobs(sys.argv[1:])
home = config.home()
print(pipeline.run(job.run, Store(home / "store"), home, Runtime(), Edit()).file)
"""
    environment = {
        **os.environ,
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TEQ_ROOT": str(copy),
    }
    argv = [*QUICK, *GPTQ, "method=teq+gptq"]
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], env=environment, cwd=copy, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    data = record.read(pathlib.Path(done.stdout.split()[-1])).data
    stages = {name: stage["cost"]["code"] for name, stage in data["stages"].items()}
    assert {code["commit"] for code in (data["code"], *stages.values())} == {commit}
    assert data["code"]["dirty"] and stages["weights"]["dirty"]
    assert stages["weights"]["sources"] == data["code"]["sources"]
    clean = subprocess.check_output(
        [sys.executable, "-c", "from teq.pipeline import cost; print(cost.code()['sources'])"],
        env=os.environ | {"PYTHONPATH": str(root)},
        cwd=tmp_path,
        text=True,
    ).strip()
    assert data["code"]["sources"] != clean


def test_a_corpus_of_another_text_is_other_work(own_home, monkeypatch):
    """python-docs differs between Python versions: the text's digest is in the keys of what read it."""
    first = run(own_home, "method=teq")
    from teq.data import embedded

    original = embedded.python_docs()
    for module in (embedded, corpora):
        monkeypatch.setattr(module, "python_docs", lambda: "A new topic. " * 30 + original)
    second = run(own_home, "method=teq")
    assert second.id == first.id and second.file != first.file
    assert cached(second)["scales"] is False


def test_unknown_device_is_refused():
    for device in ("cuda:9", "tpu", "mps"):
        with pytest.raises(UserError, match=f"device={device}"):
            resolve(device)


def start(home, *argv, **environment):
    root = pathlib.Path(__file__).resolve().parent.parent
    command = [sys.executable, str(root / "run.py"), *QUICK, *GPTQ, *argv]
    variables = {**os.environ, "TEQ_HOME": str(home), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, env=variables, cwd=home.parent, stdout=-1, stderr=-2, text=True)


def test_eight_processes_compute_each_stage_once_and_the_next_loads_no_model(own_home):
    own_home.mkdir()
    sweep = ["-m", "method=fp,rtn,gptq,teq,teq+gptq", "ppl.limit=1", "train.length=32"]
    processes = [start(own_home, *sweep) for _ in range(8)]
    logs = [process.communicate(timeout=500)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, logs
    assert all("5 records in" in log for log in logs)
    together = "".join(logs)
    # scales of identity and of teq, weights of five methods, one metric each
    assert together.count(": computing") == 12 and together.count(": done in") == 12
    another = start(own_home, *sweep)
    log = another.communicate(timeout=300)[0]
    assert another.returncode == 0 and log.count(": cached") == 5 and "loading" not in log  # the metrics
    assert len(list((own_home / "records").glob("*.json"))) == 5
    assert not list((own_home / "store").rglob("*making*")) and not list(own_home.glob("partial/*"))


@pytest.mark.parametrize(
    ("stage", "said"), [("scales", "scales"), ("weights", "weights"), ("metrics", "metrics")]
)
def test_interrupt_in_every_stage_is_one_line_and_loses_nothing(own_home, monkeypatch, capsys, stage, said):
    original = Store.get

    def interrupted(self, asked, device, content=False):
        def stop(*_, **__):
            raise KeyboardInterrupt

        if asked.name == stage:
            object.__setattr__(asked, "make", stop)
        return original(self, asked, device, content)

    import run as entry

    argv = [*QUICK, *GPTQ, "method=teq"]
    with monkeypatch.context() as patch:
        patch.setattr(Store, "get", interrupted)
        assert entry.main(argv) == 130
    printed = capsys.readouterr()
    assert cli.INTERRUPTED in printed.err and "Traceback" not in printed.err + printed.out
    finished = {"scales": 0, "weights": 1, "metrics": 2}[stage]
    store = own_home / "store"
    kept = [p for s in ("scales", "weights", "metrics") for p in (store / s).glob("*") if p.is_dir()]
    assert len(kept) == finished
    assert entry.main(argv) == 0


@pytest.mark.parametrize(
    ("method", "override", "said"),
    [
        ("teq", "evals=[python-docs,ptb-new]", r"ptb-new gives 12 tokens, one window of ppl\.context=64"),
        ("gptq", "evals=[python-docs,ptb-new]", r"ptb-new gives 12 tokens, one window of ppl\.context=64"),
        (
            "teq+gptq",
            "gptq.length=60000",
            "python-docs gives 55000 tokens, one calibration window needs",
        ),
    ],
)
def test_texts_too_short_are_found_before_any_weight_is_loaded(
    own_home, write, monkeypatch, method, override, said
):
    write("ptb_text_only/test", sentence=["a few words"])
    monkeypatch.setattr(Checkpoint, "load", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=said):
        run(own_home, f"method={method}", override)


def test_evaluations_compute_in_their_own_precision(own_home, monkeypatch):
    def ran(*given):
        (job,) = config.jobs(["model=tiny-llama", "evals=[python-docs]", "ppl.limit=2", *given])
        found = pipeline.run(job.run, Store(own_home / "store"), own_home, Runtime(), None).data
        return job.run, found["stages"], found["metrics"]["python-docs"]["values"]["ppl"]

    seen, measure = [], Perplexity.measure
    monkeypatch.setattr(
        Perplexity,
        "measure",
        lambda self, lm, runtime: seen.append(lm.model.dtype) or measure(self, lm, runtime),
    )
    same, plain, _ = ran("method=rtn", "dtype=bfloat16")
    apart, stages, _ = ran("method=rtn", "dtype=bfloat16", "eval_dtype=float16")
    assert seen == [torch.bfloat16, torch.float16]
    assert stages["weights"]["key"] == plain["weights"]["key"]
    assert stages["python-docs"]["key"] != plain["python-docs"]["key"] and apart.key() != same.key()
    assert ran("method=rtn", "dtype=bfloat16", "eval_dtype=bfloat16")[0].key() == same.key()
    # nothing of the other precision is in what is evaluated
    assert ran("method=fp", "dtype=bfloat16", "eval_dtype=float32")[2] == ran("method=fp", "dtype=float32")[2]


def test_the_paper_trains_in_bfloat16_and_evaluates_in_float16():
    def of(*given):
        run = config.jobs(["method=rtn", *given])[0].run
        return run.dtype, run.eval_dtype

    assert of("model=opt-6.7b") == of("model=llama-7b") == ("bfloat16", "float16")
    assert of("model=opt-6.7b", "dtype=float32") == ("float32", None)
    assert of("model=opt-6.7b", "dtype=float32", "eval_dtype=float16") == ("float32", "float16")
    assert of("model=opt-6.7b", "eval_dtype=bfloat16") == ("bfloat16", None)
    assert of("model=smollm2-135m") == ("float32", None)
