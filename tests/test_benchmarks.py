"""The benchmarks at tiny size on a CPU: what they write, and that nothing is measured twice."""

import importlib
import json
import math
import os

import gguf
import pytest

import run as entry
from benchmarks import autoround, export_formats, export_memory, gptq, gpu, scaling, serving, teq_step
from benchmarks.contenders import measuring
from teq.__main__ import main as teq_main
from teq.spec import UserError


def written(main, argv, file):
    """The JSON that a benchmark writes."""
    assert main(["--json", str(file), *argv]) == 0
    return json.loads(file.read_text())


def test_a_step_has_ratios_over_every_base_and_the_contenders_compute_the_same_loss(tmp_path, capsys):
    argv = ["--tokens", "16", "--repeats", "1", "--contenders", "ours", "autograd", "floor"]
    found = written(
        teq_step.main, [*argv, "neural-compressor", "--", "model=tiny-opt"], tmp_path / "step.json"
    )
    rows = found["contenders"]
    assert list(rows) == ["ours", "autograd", "floor"]
    assert "--neural-compressor" in found["left_out"]["neural-compressor"]
    assert "neural-compressor left out" in " ".join(capsys.readouterr().out.split())
    for row in rows.values():
        assert row["seconds"]["min"] > 0 and row["live_bytes"] > 0
        assert set(row["over"]) == {"autograd", "floor"}
        assert all(math.isfinite(over["seconds"]) for over in row["over"].values())
    assert rows["autograd"]["over"]["autograd"]["live_bytes"] == 1
    assert rows["ours"]["over"]["autograd"]["live_bytes"] < 1
    assert rows["ours"]["predicted_bytes"] == pytest.approx(rows["ours"]["live_bytes"], rel=0.15)
    assert rows["autograd"]["predicted_bytes"] is None
    assert found["first_loss_difference"]["autograd"] < 1e-6
    assert rows["floor"]["losses"][0] == rows["floor"]["losses"][1] != rows["ours"]["losses"][0]


def test_the_port_of_gptq_gives_our_codes_in_the_first_block(tmp_path):
    argv = ["--samples", "2", "--length", "32", "--windows", "0", "--repeats", "1", "model=tiny-opt"]
    found = written(gptq.main, argv, tmp_path / "gptq.json")
    assert found["first_block_differing"] < 1e-3
    assert found["ours"]["first_block_error"] == pytest.approx(found["port"]["first_block_error"], rel=1e-3)
    assert set(found["total_over_floor"]) == {"ours", "port"}
    for row in (found["ours"], found["port"]):
        assert row["total"]["median"] == pytest.approx(
            sum(row[part]["median"] for part in ("measuring", "quantizing", "rest"))
        )


def test_scaling_fits_the_exponents_and_measures_no_point_twice(tmp_path, monkeypatch, capsys):
    """Points that follow a power law, so that the exponents are known; the test of `gpu` has real ones."""
    parameters = {"tiny-opt": 10**6, "smollm2-135m": 10**8, "opt-1.3b": 10**9}
    measured = []

    def made(spec, repeats):
        measured.append(spec)
        size, tokens = parameters[spec.checkpoint.name], spec.tokens
        seconds = dict.fromkeys(("median", "min", "max"), 1e-9 * size**1.5 * tokens)
        sizes = {"parameters": size, "block_weights": size}
        found = {"live_bytes": size * tokens**2, "predicted_bytes": size * tokens**2}
        return {"seconds": seconds, **found, **sizes}, {"name": "made up"}

    monkeypatch.setattr(scaling, "measured", made)
    file = tmp_path / "scaling.json"
    argv = ["--models", *parameters, "--tokens", "128", "256", "512"]
    found = written(scaling.main, argv, file)
    assert len(measured) == len(found["points"]) == 2 * (3 + 2)  # tokens grow on one model only
    for kind in scaling.KINDS:
        along_models, along_tokens = found["exponents"][kind]["model"], found["exponents"][kind]["tokens"]
        assert along_models["seconds"] == pytest.approx(1.5) == along_models["seconds_last"]
        assert along_models["live_bytes"] == pytest.approx(1)
        assert along_tokens["seconds"] == pytest.approx(1)
        assert along_tokens["live_bytes"] == pytest.approx(2)
    drawn = file.with_suffix(".svg").read_bytes()
    assert written(scaling.main, argv, file) == found and len(measured) == len(found["points"])
    assert file.with_suffix(".svg").read_bytes() == drawn
    written(scaling.main, [*argv, "1024"], file)
    assert [(spec.name, spec.tokens) for spec in measured[10:]] == [("ours", 1024), ("gptq", 1024)]
    with pytest.raises(UserError, match="give another --json"):
        scaling.main([*argv, "--repeats", "2", "--json", str(file)])
    capsys.readouterr()


def test_a_cell_of_the_export_matrix_is_equal_and_not_run_again(tmp_path, monkeypatch, own_home):
    file, argv = tmp_path / "formats.json", ["--only", "gguf/tiny-llama/Q4_0/rtn"]
    (cell,) = written(export_formats.main, argv, file)["cells"].values()
    assert cell["linears"] == 14 and cell["differing"] == cell["beyond_tolerance"] == []
    assert cell["ppl"]["stored"] == pytest.approx(cell["ppl"]["reloaded"], rel=1e-6)
    monkeypatch.setattr(export_formats, "measured", lambda *_: pytest.fail("run again"))
    written(export_formats.main, argv, file)
    assert "1 equal" in export_formats.render({"gguf/tiny-llama/Q4_0/rtn": cell})


def test_the_documented_table_is_that_of_the_committed_cells():
    cells = measuring.read(export_formats.RESULTS)["cells"]
    assert export_formats.documented(cells) == export_formats.PAGE.read_text()
    assert cells.keys() <= {"/".join(cell) for cell in export_formats.cells()}


def test_an_export_is_measured_against_reading_and_writing_its_bytes(tmp_path):
    argv = ["--turns", "1", "--work", str(tmp_path / "work"), "model=tiny-opt", "bits=4", "group_size=32"]
    found = written(export_memory.main, argv, tmp_path / "export.json")
    (turn,), sizes = found["turns"], found["sizes"]
    assert found["seconds"] == turn["export"]
    assert turn["ratio"] == turn["export"] / (turn["read"] + turn["write"])
    assert found["allowed_bytes"] == sizes["block"] + sizes["embeddings"] + export_memory.ALLOWED
    assert sizes["model"] == sizes["embeddings"] + 2 * sizes["block"]
    files = (tmp_path / "work" / "result").iterdir()
    assert sizes["written"] == sum(file.stat().st_size for file in files)


def test_a_gguf_file_in_floating_point_holds_the_weights_and_the_vocabulary_of_the_packed_one(tmp_path):
    run = ["model=tiny-llama", "method=rtn", "bits=4", "group_size=32", "symmetric=true"]
    run += ["quant_grid.scale_dtype=float16", "evals=[python-docs]", "ppl.limit=2", "ppl.context=64"]
    assert teq_main(["export", *run, "--format", "gguf", "--to", str(tmp_path / "out")]) == 0
    packed = tmp_path / "out" / "model.gguf"
    copy = serving.dequantized(packed, tmp_path / "float32.gguf", "float32")
    before, after = gguf.GGUFReader(packed), gguf.GGUFReader(copy)
    assert {tensor.tensor_type.name for tensor in after.tensors} == {"F32"}
    for old, new in zip(before.tensors, after.tensors, strict=True):
        exact = gguf.quants.dequantize(old.data, old.tensor_type)
        assert old.name == new.name and (exact == new.data).all()
    assert {key: field.contents() for key, field in before.fields.items() if "tokenizer" in key} == {
        key: field.contents() for key, field in after.fields.items() if "tokenizer" in key
    }


def test_exponents_are_those_of_the_power_law():
    assert scaling.slope([1, 10, 100], [3, 3e2, 3e4]) == pytest.approx(2)
    assert scaling.slope([1, 1], [3, 4]) is None


in_a_process = gpu.ran


def ran_here(name, command, file):
    """Run a part of `gpu`, but one, in this process: each of its own would import everything once more."""
    if name == "gptq":
        return in_a_process(name, command, file)
    if name == "table5":
        assert entry.main(command[1:]) == 0
        return gpu.table5(command[1:])
    return written(importlib.import_module(command[1]).main, command[2:], file)


def test_everything_for_one_model_is_collected_and_run_once(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(gpu, "ran", ran_here)
    argv = [
        "tiny-opt",
        "--device",
        "cpu",
        "--folder",
        str(tmp_path),
        "--contenders",
        "ours",
        "--tokens",
        "16",
    ]
    argv += ["--scaling", "64", "--samples", "2", "--length", "32", "--repeats", "1", "--"]
    argv += ["recipe=quick", "train.steps=2", "ppl.context=64", "gptq.samples=2", "gptq.length=32"]
    assert gpu.main(argv) == 0, capfd.readouterr().err
    found = json.loads((tmp_path / "tiny-opt.json").read_text())
    results = {name: part["result"] for name, part in found["parts"].items()}
    assert set(results) == {"teq_step 16", "gptq", "scaling", "table5"}
    assert results["teq_step 16"]["contenders"]["ours"]["live_bytes"] > 0
    assert len(results["scaling"]["points"]) == 2
    for name, point in results["scaling"]["points"].items():
        assert point["predicted_bytes"] == pytest.approx(point["live_bytes"], rel=0.15), name
    assert results["gptq"]["total_over_floor"]["ours"] > 0
    assert set(results["table5"]) == {"teq", "gptq"}
    for cell in results["table5"].values():
        assert cell["seconds"] > 0 and cell["stages"]["weights"]["peak_bytes"] > 0
    monkeypatch.setattr(gpu, "ran", lambda *_: pytest.fail("run again"))
    assert gpu.main(argv) == 0
    assert "table5: teq" in capfd.readouterr().out


def test_a_part_that_crashes_gives_nothing_and_other_code_is_measured_again(tmp_path, monkeypatch, capfd):
    argv = ["tiny-opt", "--device", "cpu", "--folder", str(tmp_path), "--tokens", "16"]
    wrong = ["-m", "benchmarks.gptq", "--no-such-option"]  # argparse: exit status 2, and the file stays
    parts = {"gptq": wrong}
    monkeypatch.setattr(gpu, "commands", lambda _: parts)
    sources = gpu.measure.code()["sources"]
    stale = tmp_path / f"tiny-opt.gptq.{sources}.json"
    crash = tmp_path / "crash.py"
    crash.write_text("raise SystemExit(1)")  # as Python ends after a traceback
    for parts["gptq"] in (wrong, [str(crash)]):
        stale.write_text('{"total_over_floor": {}}')
        assert gpu.main(argv) == 1
        assert "failed: gptq" in capfd.readouterr().out and not (tmp_path / "tiny-opt.json").exists()
    made = []
    monkeypatch.setattr(gpu, "ran", lambda *_: made.append(1) or {"total_over_floor": {}})
    monkeypatch.setattr(gpu.Path, "unlink", lambda *_, **__: None)
    assert gpu.main(argv) == gpu.main(argv) == 0 and len(made) == 1
    monkeypatch.setattr(gpu.measure, "code", lambda: {"sources": "0" * 16, "commit": None, "dirty": None})
    assert gpu.main(argv) == 0 and len(made) == 2


def test_targets_are_held_against_the_cells_of_table_5():
    stages = {"scales": {"peak_bytes": 50 * 10**9}, "weights": {"peak_bytes": 1}}
    cells = {"teq": {"seconds": 240.0, "stages": stages}, "gptq": {"seconds": 1.0, "stages": stages}}
    found = gpu.verdicts("opt-13b", cells)
    assert found["teq"]["reached"] and not found["teq bytes"]["reached"]
    assert gpu.verdicts("tiny-opt", cells) == {}


@pytest.mark.parametrize(
    ("main", "argv", "said"),
    [
        (gpu.main, ["gpt5", "--device", "cpu"], "model=gpt5 is not allowed"),
        (teq_step.main, ["--device", "cuda:77", "model=tiny-opt"], "device=cuda:77 does not exist"),
        (teq_step.main, ["model=tiny-opt", "method=gptq"], "method=gptq trains no scales"),
    ],
)
def test_errors_are_one_line(main, argv, said, capsys):
    status = measuring.command_line(main, argv)
    printed = capsys.readouterr()
    assert status == 2 and len(printed.err.strip().splitlines()) == 1 and said in printed.err


def test_a_contender_that_cannot_be_measured_is_said_and_the_others_go_on(capsys):
    argv = ["--contenders", "neural-compressor", "--neural-compressor", "/nowhere", "--", "model=tiny-opt"]
    assert teq_step.main(argv) == measuring.INCOMPLETE
    said = " ".join(capsys.readouterr().out.split())
    assert "neural-compressor failed: neural-compressor: /nowhere cannot be run" in said


AUTOROUND = [
    "model=tiny-llama",
    "gptq.samples=8",
    "gptq.length=32",
    "--samples",
    "8",
    "--length",
    "32",
    "--windows",
    "4",
    "--context",
    "64",
    "--threads",
    "1",
]
AUTOROUND += ["--texts", "python-docs", "--settings", "method=rtn", "method=gptq"]


@pytest.mark.skipif(
    autoround.VARIABLE not in os.environ,
    reason=f"{autoround.VARIABLE} names no Python with auto-round (benchmarks/contenders/autoround_model.py)",
)
def test_auto_round_that_never_moves_is_rounding_to_nearest_and_nothing_is_measured_twice(
    tmp_path, monkeypatch, capfd
):
    """Of one iteration only the start is a candidate: V = 0 in the whole range."""
    argv = [*AUTOROUND, "--iterations", "1", "--folder", str(tmp_path)]
    found = written(autoround.main, argv, tmp_path / "autoround.json")
    rows = found["contenders"]
    assert list(rows) == ["fp", "autoround1", "method=rtn", "method=gptq"]
    losses = {name: row["losses"]["python-docs"] for name, row in rows.items()}
    assert losses["autoround1"] == pytest.approx(losses["method=rtn"], abs=1e-6)
    assert losses["autoround1"] != losses["fp"]
    assert rows["autoround1"]["token_visits"] == 4 * 32 and rows["method=gptq"]["token_visits"] == 8 * 32
    assert found["paired"]["autoround1"]["method=rtn"]["all"]["mean"] == pytest.approx(0, abs=1e-4)
    monkeypatch.setattr(autoround, "measured", lambda *_: pytest.fail("measured again"))
    assert written(autoround.main, argv, tmp_path / "autoround.json") == found
    assert "perplexity over autoround1's" in capfd.readouterr().out


def test_settings_are_measured_and_kept_without_an_environment_of_auto_round(tmp_path, monkeypatch):
    monkeypatch.delenv(autoround.VARIABLE, raising=False)
    file, argv = tmp_path / "autoround.json", [*AUTOROUND, "--folder", str(tmp_path)]
    with pytest.raises(UserError, match=f"--auto-round PYTHON or set {autoround.VARIABLE}"):
        written(autoround.main, argv, file)
    with pytest.raises(UserError, match="is no Python with auto-round"):
        written(autoround.main, [*argv, "--auto-round", "/no/python"], file)
    with pytest.raises(UserError, match="with the grid of all"):
        written(autoround.main, [*argv, "--settings", "method=rtn bits=4"], file)
    with pytest.raises(UserError, match="symmetric grid"):
        written(autoround.main, ["symmetric=true", *argv], file)
    argv += ["--only", "fp", "method=rtn"]
    found = written(autoround.main, argv, file)
    losses = {name: row["losses"]["python-docs"] for name, row in found["contenders"].items()}
    assert list(losses) == ["fp", "method=rtn"] and losses["fp"] != losses["method=rtn"]
    with pytest.raises(UserError, match="give another file"):
        written(autoround.main, [*argv, "--context", "32"], file)


def test_perplexities_are_paired_by_window():
    one, other = ({"losses": {"a": a, "b": [2.0, 2.0]}} for a in ([1.0, 2.0, 3.0], [1.1, 2.1, 3.1]))
    tests = autoround.paired(one, other)
    assert tests["a"]["mean"] == pytest.approx(100 * math.expm1(-0.1)) == tests["a"]["high"]
    assert tests["b"]["mean"] == 0 and tests["all"]["mean"] == pytest.approx(100 * math.expm1(-0.05))


def test_token_visits_are_those_of_the_steps_or_of_the_windows_once():
    steps = {"iterations": 50, "batch": 4, "length": 256, "samples": 64}
    assert autoround.visits({"quantizer": steps, "method": "signround", "evals": []}) == 51_200
    assert autoround.visits({"quantizer": {"samples": 64, "length": 256}}) == 16_384
