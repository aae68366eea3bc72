"""Every export format, loaded by its own library: which cells of a matrix come back to the bit.

    python -m benchmarks.export_formats [--json benchmarks/results/export_formats.json] [--only PATTERN ...]
                                        [--install] [--render]

A cell is format/model/grid/method. Its run is exported, and `verify` loads the folder in a process with the
format's library, the same one for all cells of a format. The JSON gets the cell at once: whether codes,
scales, zeros, weights and all other tensors are equal to the bit, the perplexity before and after, the loader
and its version, dtypes, seconds. A second call runs what is missing or failed. Training is short: whether a
model comes back does not depend on how good it is. `--render` runs nothing and writes the table of all cells
into docs/export.md.
"""

import argparse
import contextlib
import fnmatch
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from subprocess import PIPE
from typing import Any

from benchmarks.contenders import measuring
from teq.console import aligned
from teq.export import formats
from teq.pipeline import cost
from teq.spec import UserError
from teq.stage import NothingDone
from teq.verbs import export, verify

ROOT = Path(__file__).resolve().parent.parent
PAGE, RESULTS = ROOT / "docs" / "export.md", ROOT / "benchmarks" / "results" / "export_formats.json"
BEGIN, END = "<!-- python -m benchmarks.export_formats --render -->\n", "<!-- end -->\n"
MODELS = ("tiny-llama", "tiny-opt", "tiny-bloom", "smollm2-135m")
LLAMAS = ("tiny-llama", "smollm2-135m")
EVALUATION = "python-docs"
SHORT = [f"evals=[{EVALUATION}]", "ppl.limit=4", "ppl.context=256", "device=cpu", "dtype=float32"]
SHORT += ["calib.corpus=python-docs", "train.steps=5", "train.length=128"]
SHORT += [f"{group}.{size}" for group in ("gptq", "awq", "signround") for size in ("samples=4", "length=128")]
SHORT += ["signround.iterations=5", "tune.steps=5", "tune.length=128"]
HALF = "quant_grid.scale_dtype=float16"
METHODS = ("rtn", "gptq", "teq", "teq+gptq", "awq", "signround", "best")
FEW = ("rtn", "teq+gptq", "best")
GRIDS = {  # "g" is a group of 64, of 32 where 64 does not divide a model's inputs
    "w2_g": ["bits=2"],
    "w3_g": ["bits=3"],
    "w4_g": ["bits=4"],
    "w8_g": ["bits=8"],
    "w4_g16": ["bits=4", "group_size=16"],
    "w4_g_sym": ["bits=4", "symmetric=true"],
    "w8_g_sym": ["bits=8", "symmetric=true"],
    "w4": ["bits=4", "group_size=-1"],
    "w8": ["bits=8", "group_size=-1"],
    "Q4_0": ["bits=4", "group_size=32", "symmetric=true"],
    "Q5_0": ["bits=5", "group_size=32", "symmetric=true"],
    "Q8_0": ["bits=8", "group_size=32", "symmetric=true"],
}
MATRIX = {  # by format: grids and the methods run in each
    "compressed-tensors": {
        **dict.fromkeys(("w3_g", "w4_g"), METHODS),
        "w4_g_sym": ("rtn",),
        **dict.fromkeys(("w4", "w8"), (*METHODS, "gptq-ao")),
    },
    "gptq": {
        **dict.fromkeys(("w2_g", "w3_g", "w4_g", "w8_g"), (*FEW, "gptq-ao")),
        **dict.fromkeys(("w4_g_sym", "w8_g_sym", "w4", "w8"), ("rtn",)),
    },
    "awq": {"w4_g": (*FEW, "awq"), "w4_g16": ("rtn",), "w4": FEW},
    "gguf": dict.fromkeys(("Q4_0", "Q5_0", "Q8_0"), FEW),
}

Cell = dict[str, Any]


def cells() -> Iterator[tuple[str, str, str, str]]:
    """Yield format, model, grid and method of every cell."""
    for form, grids in MATRIX.items():
        for grid, methods in grids.items():
            for method in methods:
                for model in LLAMAS if form == "gguf" else MODELS:
                    yield form, model, grid, method


def overrides(form: str, model: str, grid: str, method: str) -> list[str]:
    """Return the run of a cell."""
    size = 32 if model == "tiny-llama" else 64
    given = [f"model={model}", f"method={method}", *GRIDS[grid]]
    given += [] if any(one.startswith("group_size") for one in given) else [f"group_size={size}"]
    return [*given, *([HALF] if form in formats.HALF else []), *SHORT]


class Loader:
    """A process with one format's library, which loads a folder for each line that it is sent."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def __call__(
        self, folder: Path, request: Mapping[str, Any], variables: Mapping[str, str]
    ) -> dict[str, Any]:
        """Return what stock code finds in a folder. Raises UserError."""
        if self.process is None:
            command = [sys.executable, "-m", "benchmarks.contenders.reloader"]
            self.process = subprocess.Popen(
                command, stdin=PIPE, stdout=sys.stderr, env=dict(variables), text=True, cwd=ROOT
            )
        file = folder.parent / "answer.json"
        self.process.stdin.write(json.dumps([str(folder), request, str(file)]) + "\n")
        self.process.stdin.flush()
        while not file.exists():
            if self.process.poll() is not None:
                raise UserError(f"the loader ended with {self.process.returncode}")
            time.sleep(0.02)
        answer = measuring.read(file)
        if "error" in answer:
            raise UserError(answer["error"])
        return answer

    def close(self) -> None:
        """Let the process end."""
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()
            self.process = None


def measured(form: str, argv: list[str], install: bool, loader: Loader) -> Cell:
    """Export and verify one cell."""
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(sys.stderr):
        folder, start = Path(temporary) / "out", time.perf_counter()
        if export.main([*argv, "--format", form, "--to", str(folder)]):
            raise UserError("it could not be exported")
        exported = time.perf_counter()
        found = verify.verified(folder, install, True, loader)
        seconds = {"export": exported - start, "verify": time.perf_counter() - exported}
    manifest, answer = found.manifest, found.answer
    before, after = (side["metrics"][EVALUATION]["values"]["ppl"] for side in (manifest, answer))
    return {
        "id": manifest["id"],
        "linears": len(manifest["linears"]),
        "tensors": len(manifest["tensors"]),
        "differing": found.tensors,
        "beyond_tolerance": found.wrong,
        "ppl": {"stored": before, "reloaded": after, "difference": abs(after - before) / before},
        "dtype": {"run": manifest["run"]["dtype"], "loaded": answer["dtype"]},
        "linear": answer["linear"],
        "versions": answer["versions"],
        "bits_per_weight": manifest["bits_per_weight"],
        "seconds": seconds,
        "code": cost.code(),
    }


def wrong(cell: Cell) -> str:
    """Return why a cell does not come back, or nothing."""
    return cell.get("error") or ", ".join(cell["beyond_tolerance"])


def render(found: dict[str, Cell]) -> str:
    """Return the tables of all cells: how many come back, and by what they were loaded."""
    rows, loaders = [["format", "grid", *MODELS]], [["format", "linears", "dtype", "versions"]]
    for form, grids in MATRIX.items():
        for grid, methods in grids.items():
            lines = [_shown(found, form, model, grid, methods) for model in MODELS]
            rows.append([form, grid, *lines])
        run = [cell for name, cell in found.items() if name.split("/")[0] == form and "versions" in cell]
        linears = ", ".join(sorted({cell["linear"] for cell in run})) or "not run"
        dtypes = ", ".join(sorted({cell["dtype"]["loaded"] for cell in run}))
        versions = sorted({f"{name} {v}" for cell in run for name, v in cell["versions"].items()})
        loaders.append([form, linears, dtypes, ", ".join(versions)])
    return f"{aligned(rows)}\n\n{aligned(loaders)}\n"


def _shown(found: dict[str, Cell], form: str, model: str, grid: str, methods: tuple[str, ...]) -> str:
    if form == "gguf" and model not in LLAMAS:
        return "refused"
    by_method = {method: found.get(f"{form}/{model}/{grid}/{method}") for method in methods}
    run = {method: cell for method, cell in by_method.items() if cell is not None}
    compared = {m: cell for m, cell in run.items() if "ppl" in cell}
    equal = [cell for cell in compared.values() if not cell["beyond_tolerance"]]
    parts = []
    if equal:
        worst = max(cell["ppl"]["difference"] for cell in equal)
        parts.append(f"{len(equal)} equal (ppl {f'{worst:.0e}' if worst else 'equal'})")
    if failed := [method for method, cell in run.items() if "error" in cell]:
        parts.append(f"**not loaded: {', '.join(failed)}**")
    if differ := [method for method, cell in compared.items() if cell not in equal]:
        parts.append(f"**differs: {', '.join(differ)}**")
    if nothing := [method for method, cell in run.items() if "nothing_done" in cell]:
        parts.append(f"no effect: {', '.join(nothing)}")
    if missing := [method for method in methods if method not in run]:
        parts.append("not run" if len(missing) == len(methods) else f"not run: {', '.join(missing)}")
    return "; ".join(parts)


def documented(found: dict[str, Cell]) -> str:
    """Return docs/export.md with the table of these cells."""
    head, _, rest = PAGE.read_text().partition(BEGIN)
    return head + BEGIN + render(found) + END + rest.partition(END)[2]


def main(argv: list[str]) -> int:
    """Run the cells that are missing, and write each; or render. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="as */tiny-*/w4*/rtn")
    parser.add_argument("--install", action="store_true", help="fetch loaders, as verify --install does")
    parser.add_argument("--render", action="store_true", help="write the table into docs/export.md")
    given = parser.parse_args(argv)
    found: dict[str, Any] = {"settings": SHORT, "cells": {}}
    if given.json.is_file():
        found = measuring.read(given.json)
        if found["settings"] != SHORT:
            raise UserError(f"{given.json} is of other settings: give another file")
    done = found["cells"]
    if given.render:
        PAGE.write_text(documented(done))
        return 0
    missing = [cell for cell in cells() if wrong(done.get("/".join(cell), {"error": "not run"}))]
    failed = 0
    for form, group in itertools.groupby(missing, key=lambda cell: cell[0]):
        with contextlib.closing(Loader()) as loader:
            for cell in group:
                name = "/".join(cell)
                if not any(fnmatch.fnmatchcase(name, pattern) for pattern in given.only):
                    continue
                install = given.install and loader.process is None
                try:
                    done[name] = measured(form, overrides(*cell), install, loader)
                except NothingDone as error:  # in so short a training: there is nothing to export
                    done[name] = {"nothing_done": measuring.brief(error), "beyond_tolerance": []}
                except UserError as error:
                    done[name] = {"error": measuring.brief(error)}
                failed += bool(said := wrong(done[name]))
                print(f"{name}: {said or done[name].get('nothing_done') or 'equal'}", flush=True)
                found["machine"] = cost.machine("cpu")
                measuring.write(given.json, found)
    return measuring.INCOMPLETE if failed else 0


if __name__ == "__main__":
    sys.exit(measuring.command_line(main, sys.argv[1:]))
