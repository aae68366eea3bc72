"""The model card, README.md with front matter, rendered from an export's manifest alone."""

import json
import math
from collections.abc import Mapping
from typing import Any

from teq import statistics
from teq.console import aligned
from teq.record import Record

PARTS = ("transform", "quantizer", "finetune")  # of a run; the last one only where there is one
NORMAL = 1.959963984540054  # 97.5 % quantile of the standard normal
LOADING = {
    "compressed-tensors": "`AutoModelForCausalLM.from_pretrained(folder)`, with compressed-tensors",
    "gptq": "`AutoModelForCausalLM.from_pretrained(folder)`, with GPTQModel and optimum",
    "awq": "`AutoModelForCausalLM.from_pretrained(folder)`, with GPTQModel and optimum",
    "gguf": 'llama.cpp, or `AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf")`',
}


def interval(record: Record, evaluation: str) -> dict[str, float]:
    """Return the half width of the 95 % confidence interval of each number that has one."""
    arrays, found = record.metrics[evaluation]["arrays"], {}
    if "window_loss" in arrays:
        found["ppl"] = statistics.stderr_of_perplexity(record.array(evaluation, "window_loss"))
    for name, array in (("acc", "correct"), ("acc_norm", "correct_norm")):
        if array in arrays:
            found[name] = statistics.stderr_of_mean(record.array(evaluation, array))
    return {name: NORMAL * error for name, error in found.items() if not math.isnan(error)}


def render(manifest: Mapping[str, Any]) -> str:
    """Return the card's text."""
    run, source = manifest["run"], manifest["run"]["model"]["source"]
    grid, name = run["quantizer"]["grid"], run["model"]["name"]
    front = ["library_name: transformers", "pipeline_tag: text-generation"]
    front += [f"base_model: {source['repo']}", "base_model_relation: quantized"] if "repo" in source else []
    tags = ["quantized", manifest["format"], run["method"]]
    cut = "whole rows" if grid["group_size"] == -1 else f"groups of {grid['group_size']}"
    kind = "symmetric" if grid["symmetric"] else "asymmetric"
    code = manifest["code"]
    commit = f"{code['commit']}{' with changes' if code['dirty'] else ''}"
    settings = {part: run[part] for part in PARTS if part in run}
    return "\n".join(
        [
            "---",
            *front,
            f"tags: [{', '.join(json.dumps(tag) for tag in tags)}]",
            "---",
            "",
            f"# {name}, {run['method']}, {grid['bits']} bits",
            "",
            f"- Method: {run['method']}",
            f"- Grid: {grid['bits']} bits, {kind}, {cut}, scales in {manifest['scale_dtype']}; "
            f"{manifest['bits_per_weight']} bits per quantized weight",
            f"- Weights before: {name}, {manifest['identity']}",
            f"- Calibration: {_calibration(manifest)}",
            f"- Format: {manifest['format']}; loaded by {LOADING[manifest['format']]} "
            f"(`pip install {' '.join(map(repr, manifest['loader']))}`)",
            f"- Everything else: {manifest['dtype']}",
            f"- Code: commit {commit}",
            f"- Made by: `{manifest['command']}`",
            "",
            f"Measured before the export, in {run['dtype']} (run {manifest['id']}):",
            "",
            aligned([["evaluation", "metric", "value ± 95 % interval"], *_rows(manifest)]),
            "",
            "`python -m teq verify <this folder>` loads the folder and compares it with these numbers.",
            "",
            "```json",
            json.dumps(settings, indent=1),
            "```",
            "",
        ]
    )


def _rows(manifest: Mapping[str, Any]) -> list[list[str]]:
    """Return a row for each number that was measured."""
    rows = []
    for evaluation, metric in manifest["metrics"].items():
        for name, value in metric["values"].items():
            if not name.endswith("_stderr"):
                half = metric["interval"].get(name)
                rows.append([evaluation, name, f"{value:.4g}" + ("" if half is None else f" ± {half:.2g}")])
    return rows


def _calibration(manifest: Mapping[str, Any]) -> str:
    """Return which text calibrated which part of the method."""
    run, found = manifest["run"], []
    for part in (part for part in PARTS if part in run):
        settings = run[part]
        if manifest["text"][part] is not None:
            count = settings.get("samples")
            windows = f"{count} windows" if count else "windows"
            length = settings.get("length")
            found.append(
                f"{settings['kind']} on {windows} of {length} tokens of {settings['calib']['corpus']}"
            )
    return ", ".join(found) or "none"
