"""What a run is predicted to need."""

import json

from teq import config
from teq.__main__ import main
from teq.pipeline import estimate, forecast

TINY = ["model=tiny-llama", "method=teq+gptq", "train.length=64", "train.steps=10", "gptq.samples=4"]
TINY += ["gptq.length=64", "evals=[python-docs,lastword-python-docs]", "ppl.context=64", "ppl.limit=5"]


def rows(text):
    """The table's cells by stage and strategy."""
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {(stage, strategy): (size, seconds) for stage, size, _, _, strategy, seconds in cells[2:]}


def test_seconds_follow_from_a_rate(no_weights, own_home, monkeypatch, capsys):
    (job,) = config.jobs(TINY)
    own_home.mkdir()
    (own_home / forecast.RATES).write_text(json.dumps({forecast.rate_name("cpu", "float32"): 1e6}))
    main(["plan", *TINY])
    found = rows(capsys.readouterr().out)
    two = estimate.estimate(
        job.run.transform, job.run.model.source.dimensions(), job.run.model.arch, "float32", "keep"
    )
    assert found["scales", "keep (picked)"][1] == f"{5 * two.flops / 1e6:.0f}"
    assert int(found["weights", "keep (picked)"][1]) > 0 and int(found["python-docs", "keep (picked)"][1]) > 0
    (own_home / forecast.RATES).write_text("{")
    assert main(["plan", *TINY]) == 2
    assert "is damaged: delete it and calibrate again" in capsys.readouterr().err


def test_calibration_measures_and_keeps_a_rate(own_home, monkeypatch, capsys):
    small = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 300}
    monkeypatch.setattr(forecast, "CALIBRATION", forecast.CALIBRATION | small)
    assert main(["plan", "--calibrate", *TINY]) == 0
    (rate,) = json.loads((own_home / forecast.RATES).read_text()).values()
    assert 1e6 < rate < 1e15
    assert "not known" not in rows(capsys.readouterr().out)["scales", "keep (picked)"]
