"""The one loaded model of a run."""

import dataclasses

import pytest
from conftest import in_a_cycle
from tiny_jobs import QUICK

from teq import config
from teq.models.checkpoint import Checkpoint
from teq.pipeline import loaded
from teq.quantizers.rtn import Rtn


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


def test_a_model_in_a_reference_cycle_is_gone_before_another_is_loaded(monkeypatch, only_counted_references):
    (job,) = config.jobs(["model=tiny-llama"])
    alive, load = [], Checkpoint.load

    def noting(*args):
        alive.append([model() is not None for model in models])
        return load(*args)

    monkeypatch.setattr(Checkpoint, "load", noting)
    models = []
    for _ in range(2):  # two runs, two models each
        bench = loaded.LoadedModel(job.run.model, "float32", "cpu")
        models.append(in_a_cycle(bench.to_use_up()))
        models.append(in_a_cycle(bench.to_use_up()))
        del bench
    assert alive == [[], [False], [False] * 2, [False] * 3]
