"""Records written by hand for the runs of an experiment: no model, no torch."""

import json
from pathlib import Path

import numpy as np

from teq import record


def made(folder: Path, job, *, evals=None, change=None, seconds=10.0, scales=None, created="2026-01-01"):
    """Write the record that `job`'s run would leave, with the metrics of `evals` by evaluation name.

    A perplexity is given as its per-window losses, an accuracy as its per-document correctness, counts as a
    dict. `change(data)` alters the record before it is written.
    """
    metrics = {}
    for evaluation in job.run.evals:
        given = (evals or {}).get(evaluation.name)
        if given is None:
            continue
        if isinstance(given, dict):
            metrics[evaluation.name] = {"values": given, "arrays": {}, "info": {}}
            continue
        array = np.asarray(given, dtype=np.float64)
        is_ppl = hasattr(evaluation, "context")
        key, value = ("ppl", float(np.exp(array.mean()))) if is_ppl else ("acc", float(array.mean()))
        name, what = ("window_loss", "tokens") if is_ppl else ("correct", "documents")
        info = {f"{what}_sha256": "0" * 64, "windows" if is_ppl else "documents": len(array)}
        info |= {"context": evaluation.context, "available_windows": len(array)} if is_ppl else {}
        metrics[evaluation.name] = {
            "values": {key: value},
            "arrays": {name: record.pack(array)},
            "info": info,
        }
    plain = json.loads(json.dumps(job.run.plain()))
    kept = [p for p, e in zip(plain["evals"], job.run.evals, strict=True) if e.name in metrics]
    cost = {
        "seconds": seconds,
        "peak_bytes": 2**20,
        "machine": {"device": "cpu", "name": "hand", "versions": {}},
    }
    data = {
        "id": job.run.key(),
        "created": created,
        "run": {**plain, "method": job.run.method, "evals": kept},
        "identity": "made by hand",
        "metrics": metrics,
        "training": {"loss": [3.0, 2.5, 2.0] if "teq" in job.run.method else [], "scales": scales or {}},
        "quantization": {},
        "text": {"transform": None, "quantizer": None},
        "stages": {
            name: {"key": job.run.key() + name, "digest": "0" * 16, "cost": cost, "cached": False}
            for name in ("scales", "weights", *metrics)
        },
        "code": {"commit": None, "dirty": None},
        "machine": {
            "device": "cpu",
            "name": "hand",
            "cpus": 2,
            "threads": 1,
            "python": "3",
            "versions": {"torch": "0"},
        },
    }
    if change is not None:
        change(data)
    return record.write(data, folder)


def add_experiment(monkeypatch, root: Path, name: str, text: str) -> None:
    """Let `root` be the project, with experiments/<name>.yaml as an experiment and this clone's conf/."""
    from teq import config

    file = root / "experiments" / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"# @package _global_\n{text}")
    if not (root / "conf").exists():
        (root / "conf").symlink_to(config.ROOT / "conf")
    monkeypatch.setenv("TEQ_ROOT", str(root))
