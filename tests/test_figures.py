"""Figures from histograms in records written by hand."""

import numpy as np
import pytest
from record_factory import made

from teq import config
from teq.report import figure
from teq.report.layout_checks import parse
from teq.report.match import RecordIndex
from teq.report.read import read
from teq.report.render import draw, formats, sheets


def histogram(values):
    """As `teq.transforms.summary` keeps it."""
    counts, edges = np.histogram(values, 64)
    return {"lowest": float(edges[0]), "highest": float(edges[-1]), "counts": counts.tolist()}


def scales(spreads, channels=400):
    """Summaries of three sites a layer, s / s0 spread evenly by a factor up to 1 + spread around one."""
    out = {}
    for layer, spread in enumerate(spreads):
        for site in ("norm", "other"):
            s = np.linspace(1 - spread, 1 + spread, channels)
            near = float(((s >= 0.75) & (s <= 1.25)).mean())
            name = f"model.layers.{layer}.{site}"
            out[name] = {"s": histogram(s), "moved": histogram(s), "near": near, "channels": channels}
    return out


@pytest.fixture
def drawn(tmp_path):
    """Figure 2 with records of two of its panels."""
    jobs = config.jobs(["experiments=figure2", "model=bloom-3b,opt-6.7b,tiny-opt"])
    for job in jobs:
        grid = job.run.quantizer.grid
        if (job.run.model.name, grid.bits, grid.group_size) in (("bloom-3b", 3, 128), ("tiny-opt", 4, -1)):
            made(tmp_path, job, evals={"wikitext2": [2.0, 2.1]}, scales=scales([0.5, 0.2, 0.1, 0.3]))
    layout = parse("figure2", config.experiment("figure2")["layout"])
    return figure.fill("figure2", layout, jobs, RecordIndex(tmp_path))


def test_a_panel_of_the_paper_has_its_grid_and_other_models_have_all(drawn):
    places = [(panel.model, panel.grid, panel.match is not None) for panel in drawn.panels]
    assert places == [
        ("bloom-3b", "w3_g128", True),
        ("opt-6.7b", "w4", False),
        ("tiny-opt", "w4", True),
        ("tiny-opt", "w4_g128", False),
        ("tiny-opt", "w3_g128", False),
    ]


def test_the_numbers_behind_a_panel(drawn):
    shown = sheets.of_figure(drawn)
    header = shown.header
    first, second = ([box.ours for box in row] for row in shown.rows[:2])
    panel = drawn.panels[0]
    # of scales spread evenly over [0.5, 1.5] half lie in [0.75, 1.25]; over [0.7, 1.3] five sixths
    assert [layer.near for layer in panel.layers] == pytest.approx([0.5, 1, 1, 5 / 6], abs=0.01)
    assert panel.near == pytest.approx((0.5 + 1 + 1 + 5 / 6) / 4, abs=0.01)
    expected = [np.abs(np.log2(np.linspace(1 - d, 1 + d, 100_000))).mean() for d in (0.5, 0.2, 0.1, 0.3)]
    assert [layer.movement for layer in panel.layers] == pytest.approx(expected, rel=0.01)
    assert panel.thirds == pytest.approx((np.mean(expected[:2]), expected[2], expected[3]), rel=0.01)
    assert first[:3] == ["bloom-3b", "w3_g128", f"{panel.near:.2%}"]
    assert first[3].startswith("0 (50.")
    assert (header[-1], first[-1]) == ("middle moves least", "yes")
    assert second == ["opt-6.7b", "w4", *["–"] * 6]


def test_a_start_is_never_taken_for_another(drawn, tmp_path):
    jobs = config.jobs(["experiments=figure3", "model=bloom-3b"])
    layout = parse("figure3", config.experiment("figure3")["layout"])
    (panel,) = figure.fill("figure3", layout, jobs, RecordIndex(tmp_path)).panels
    assert panel.match is None


def test_counts_in_other_bins():
    own = {"lowest": 0.0, "highest": 4.0, "counts": [4, 0, 2, 2]}
    assert draw.rebinned(own, np.array([0, 0.5, 1, 3, 4.0])).tolist() == [2, 2, 2, 2]
    assert draw.rebinned(own, np.linspace(-10, 10, 7)).sum() == 8
    assert draw.rebinned(own, np.array([3.0, 4.0])).tolist() == [2]
    one = {"lowest": 1.0, "highest": 1.0, "counts": [7, 0]}
    assert draw.rebinned(one, np.array([0, 0.9, 1.1])).tolist() == [0, 7]


def test_the_same_records_draw_the_same_bytes(drawn):
    first, second = draw.draw(drawn), draw.draw(drawn)
    assert first == second
    assert set(first) == {"svg", "png"}
    assert b"bloom-3b w3_g128" in first["svg"]
    assert b"opt-6.7b" not in first["svg"]
    assert b"<dc:date>" not in first["svg"]


def test_nothing_to_draw(tmp_path):
    shown = read("figure2", ["model=opt-6.7b"], RecordIndex(tmp_path))
    assert shown.drawings == {}
    assert "python run.py model=opt-6.7b method=teq grid=w4" in shown.markdown()


def test_text_of_a_figure(drawn):
    latex = formats.latex(sheets.of_figure(drawn))
    markdown = formats.markdown(sheets.of_figure(drawn))
    assert "(../figures/figure2.svg)" in markdown
    assert "not run: 3 of 5 panels; `python run.py model=opt-6.7b" in markdown
    rows = formats.comma_separated(sheets.of_figure(drawn)).splitlines()
    assert len(rows) == 1 + 2 * 4
    assert rows[1].startswith("bloom-3b,w3_g128,0,800,0.5")
    assert r"\includegraphics[width=\linewidth]{../figures/figure2.png}" in latex
