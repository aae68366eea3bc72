"""`python -m teq verify`: a folder that stock code loads to the run's numbers, and ones that it does not."""

import os
import re
import subprocess
import sys

import pytest

import teq
from teq import config
from teq.__main__ import main
from teq.spec import UserError
from teq.verbs import verify

SHORT = ["model=tiny-llama", "ppl.limit=2", "ppl.context=64", "evals=[python-docs]"]
GRID = ["bits=4", "group_size=32", "symmetric=true", "quant_grid.scale_dtype=float16"]
RTN = ["method=rtn"]


def exported(folder, form="gguf", *more):
    """Export a tiny model to a folder."""
    assert main(["export", *SHORT, *GRID, *(more or RTN), "--format", form, "--to", str(folder)]) == 0
    return folder


def edited(file, position, value):
    """Change one byte of a file, counted from its end."""
    data = bytearray(file.read_bytes())
    data[-position] ^= value
    file.write_bytes(data)


def test_an_exported_folder_has_the_numbers_of_its_run_and_an_edited_one_is_found(tmp_path, capsys):
    """Of a model whose scales and norms were tuned."""
    more = ["method=rtn", "finetune=scales+norms", "tune.steps=5", "tune.length=64"]
    folder = exported(tmp_path / "out", "gguf", *more)
    assert main(["verify", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "run in float32, loaded in float32 as Linear" in text
    assert "0.0e+00" in text and "equal: 14 linears, 7 other tensors" in text
    edited(folder / "model.gguf", 3000, 1)
    assert main(["verify", "--skip-evaluations", str(folder)]) == 1
    assert "differs: model.layers.1.mlp." in capsys.readouterr().out


def test_a_perplexity_is_compared_in_the_dtype_that_the_run_was_evaluated_in():
    stored, found = ({"python-docs": {"values": {"ppl": ppl}, "info": {}}} for ppl in (20.0, 20.01))
    for evaluated, tolerated in (("float32", False), ("bfloat16", True)):
        manifest = {"run": {"dtype": "float32", "eval_dtype": evaluated}, "metrics": stored}
        wrong = verify._numbers(manifest, {"dtype": "float32", "metrics": found})[1]
        assert (wrong == []) is tolerated


@pytest.mark.parametrize(
    ("dtype", "change", "tolerated"),
    [("float32", 1e-7, True), ("float32", 1e-5, False), ("float16", 5e-4, True), ("float16", 2e-3, False)],
)
def test_a_perplexity_may_differ_more_where_the_loader_computes_in_another_dtype(dtype, change, tolerated):
    info = {"tokens_sha256": "0"}
    stored = {"python-docs": {"values": {"ppl": 20.0}, "info": info}}
    found = {"python-docs": {"values": {"ppl": 20.0 * (1 + change)}, "info": info}}
    manifest = {"run": {"dtype": "float32"}, "metrics": stored}
    rows, wrong = verify._numbers(manifest, {"dtype": dtype, "metrics": found})
    assert wrong == ([] if tolerated else ["python-docs: ppl"])
    assert rows[0][:2] == ["python-docs", "ppl"]
    found["python-docs"]["info"] = {"tokens_sha256": "1"}
    assert (
        "python-docs: the text or its tokens"
        in verify._numbers(manifest, {"dtype": dtype, "metrics": found})[1]
    )


def test_compressed_tensors_loads_what_is_exported(tmp_path, capsys):
    pytest.importorskip("compressed_tensors", reason="needs the export extra")
    folder = exported(tmp_path / "out", "compressed-tensors")
    assert main(["verify", str(folder)]) == 0
    edited(sorted(folder.glob("*.safetensors"))[1], 5000, 1)
    assert main(["verify", "--skip-evaluations", str(folder)]) == 1
    assert "differs: model.layers.0." in capsys.readouterr().out


def test_what_cannot_be_verified_is_said_in_a_line(tmp_path, capsys, monkeypatch):
    assert main(["verify", str(tmp_path)]) == 2
    assert "has no readable teq.json" in capsys.readouterr().err
    folder = exported(tmp_path / "out", "compressed-tensors")
    monkeypatch.setattr("teq.export.compressed_tensors.MODULE", "not_installed")
    assert main(["verify", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert "compressed-tensors>=0.18 is not installed" in line and "--install" in line
    with pytest.raises(UserError, match=r"is not installed, .*`pip install 'compressed-tensors>=0\.18'"):
        teq.load(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda file: file.unlink(), "has no readable teq.json"),
        (lambda file: file.write_text("{"), "has no readable teq.json"),
        (lambda file: file.write_text("[1]"), "is not as `export` wrote it"),
        (lambda file: file.write_text('{"format": "gguf"}'), "is not as `export` wrote it"),
    ],
)
def test_a_damaged_manifest_is_said_in_a_line(tmp_path, capsys, edit, message):
    folder = exported(tmp_path / "out")
    edit(folder / "teq.json")
    assert main(["verify", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("error: ") and message in line
    with pytest.raises(UserError, match=re.escape(message)):
        teq.load(folder)


@pytest.mark.parametrize("edit", [lambda file: os.truncate(file, file.stat().st_size // 2), os.unlink])
def test_weights_that_are_cut_off_or_gone_are_said_in_a_line(tmp_path, capsys, edit):
    folder = exported(tmp_path / "out")
    edit(folder / "model.gguf")
    assert main(["verify", str(folder)]) == 2
    (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("error: ")]
    assert "could not be loaded and measured" in line


def test_the_process_that_measures_knows_nothing_of_ours_but_the_evaluation():
    code = (
        "import sys, teq.evaluate.reloaded; print(*{n.split('.')[1] for n in sys.modules if n[:4] == 'teq.'})"
    )
    path = os.environ | {"PYTHONPATH": str(config.ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=path, capture_output=True, text=True, check=True)
    assert not {"quantizers", "transforms", "pipeline", "export", "config", "grid"} & set(done.stdout.split())
