"""AutoRound against this project's methods: the same weights, calibration windows, grid and perplexities.

    python -m benchmarks.autoround --json benchmarks/results/autoround.json --auto-round PYTHON
        [--iterations 50 200] [--settings "method=rtn" "method=gptq gptq.samples=32" ...]
        [--only NAME ...] [--windows 64] [--context 512] [--threads 2] [--folder FOLDER] [overrides]

  autoroundK  auto-round itself with K iterations a block, in the environment of --auto-round or of the
              variable AUTO_ROUND_PYTHON (benchmarks/contenders/autoround_model.py says how it is made):
              float32, `--batch` of the `--samples` windows of `--length` tokens a step, everything else its
              default but torch.compile, which --compile allows
  a setting   overrides as for run.py, which are their own name; run.py runs them in FOLDER/home, where no
              earlier run has left a stage
  fp          the model as it is

`overrides` belong to all: the model, the grid, the calibration text. Dequantized weights are evaluated here,
all contenders alike, on `--windows` of `--context` tokens spaced evenly over each text of `--texts` (public
ones from TEQ_DATA or the hub). Printed: seconds of quantizing (loading left out), token visits (tokens that
steps, or a calibration without steps, read per block), perplexities, and each setting's perplexity over each
AutoRound's, with the 95 % interval of the paired difference of window losses.

Every finished contender is written at once, and another call measures those that are missing; quantized
weights stay in FOLDER until then. --only says which contenders are measured by this call.
"""

import argparse
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import teq
from benchmarks.contenders import measuring
from benchmarks.contenders.measuring import shown
from teq import config, record, statistics
from teq import data as texts
from teq.evaluate.perplexity import window_loss
from teq.models import arch
from teq.models.checkpoint import LM
from teq.pipeline import cost
from teq.pipeline.settings import Run
from teq.quantizers.gptq.settings import Gptq
from teq.spec import UserError

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "contenders" / "autoround_model.py"
VARIABLE = "AUTO_ROUND_PYTHON"
THEIRS, UNQUANTIZED = "autoround", "fp"
CHEAP = ["evals=[python-docs]", "ppl.limit=1", "device=cpu"]  # run.py wants an evaluation, ours is here


@dataclass(frozen=True)
class Setup:
    """What all contenders share. `base` is a run of the model with the grid and the calibration windows."""

    base: Run
    overrides: list[str]
    windows: int
    context: int
    corpora: list[str]
    batch: int
    threads: int
    compile: bool
    python: str | None
    folder: Path

    @property
    def calibration(self) -> Gptq:
        """Return settings with the grid, the calibration text and its windows."""
        return self.base.quantizer

    def given(self) -> dict[str, Any]:
        """Return what every quantization is given."""
        shared = {name: self.calibration.plain()[name] for name in ("grid", "calib", "samples", "length")}
        return {"model": self.base.model.plain(), "dtype": self.base.dtype, **shared}

    def plain(self) -> dict[str, Any]:
        """Return what results depend on."""
        kept = ("windows", "context", "corpora", "batch", "threads", "compile")
        return self.given() | {name: getattr(self, name) for name in kept}

    def load(self) -> LM:
        """Return the model as it is."""
        return self.base.model.load(self.base.dtype, "cpu")


def autoround(setup: Setup, iterations: int) -> tuple[dict[str, Any], LM]:
    """Return what auto-round took, and the model with its weights; what is in the folder is not repeated."""
    lm, calibration = setup.load(), setup.calibration
    work = setup.folder / f"{THEIRS}{iterations}"
    job = {"grid": calibration.grid.plain(), "iterations": iterations}
    job |= {name: getattr(setup, name) for name in ("batch", "threads", "compile")}
    asked = json.dumps(setup.given() | job, sort_keys=True)
    if not (work / "found.json").is_file() or (work / "asked.json").read_text() != asked:
        work.mkdir(parents=True, exist_ok=True)
        (work / "found.json").unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(dir=setup.folder) as made:
            lm.model.save_pretrained(made)
            lm.tokenizer.save_pretrained(made)
            tokens = texts.calibration(
                calibration.calib, lm.tokenizer, calibration.samples, calibration.length
            )
            save_file({"tokens": tokens.contiguous()}, Path(made) / "tokens.safetensors")
            (Path(made) / "job.json").write_text(json.dumps(job))
            child(setup, f"{THEIRS}{iterations}", [str(setup.python), str(SCRIPT), made])
            (work / "asked.json").write_text(asked)
            for name in ("weights.safetensors", "found.json"):
                (Path(made) / name).replace(work / name)
    weights = load_file(work / "weights.safetensors")
    names = [
        f"{name}.weight"
        for block, module in arch.blocks(lm.model, lm.arch).items()
        for name in arch.linears(block, module)
    ]
    if missing := sorted(set(names) ^ weights.keys()):
        raise UserError(
            f"{THEIRS}{iterations}: auto-round and this project differ in quantizing {missing[0]}"
        )
    for name, weight in weights.items():
        lm.model.get_parameter(name).copy_(weight)
    visits = iterations * setup.batch * calibration.length
    return json.loads((work / "found.json").read_text()) | {"token_visits": visits}, lm


def ours(setup: Setup, name: str) -> tuple[dict[str, Any], LM]:
    """Return what a setting's stages took, from its record, and the model with its weights."""
    words = [*setup.overrides, *shlex.split(name), *CHEAP]
    child(setup, name, [sys.executable, str(ROOT / "run.py"), *words])
    (job,) = config.jobs(words)
    with mock.patch.dict(os.environ, {"TEQ_HOME": str(setup.folder / "home")}):
        found = [one for one in record.load(config.home() / "records") if one.id == job.run.key()]
        if not found:
            raise UserError(f"{name}: run.py left no record")
        model, tokenizer = teq.load(shlex.join(words))
    data = found[-1].data
    costs = [stage["cost"] for stage in data["stages"].values() if stage["key"] not in _evaluations(data)]
    taken = {
        "seconds": sum(each["seconds"] for each in costs),
        "peak_bytes": max((each["peak_bytes"] or 0 for each in costs), default=0) or None,
        "token_visits": visits(data["run"]),
        "run": found[-1].id,
    }
    return taken, LM(model, tokenizer, job.run.model.arch, data["identity"])


def _evaluations(data: dict[str, Any]) -> set[str]:
    return {stage["key"] for name, stage in data["stages"].items() if name in data["metrics"]}


def visits(run: dict[str, Any]) -> int:
    """Return the tokens that a run's stages read per block: those of their steps, or all windows once."""
    total = 0
    for stage in run.values():
        if isinstance(stage, dict) and "length" in stage:
            steps = stage.get("steps", stage.get("iterations"))
            windows = stage["samples"] if steps is None else steps * stage["batch"]
            total += windows * stage["length"]
    return total


def child(setup: Setup, name: str, command: list[str]) -> None:
    """Run a command with the threads of all. Raises UserError with its last line where it fails."""
    variables = {"TEQ_HOME": str(setup.folder / "home"), "OMP_NUM_THREADS": str(setup.threads)}
    last = ""
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | variables, stdout=2, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stderr:
            sys.stderr.write(line)
            last = line.strip() or last
    if process.returncode:
        raise UserError(f"{name}: {last or f'ended with status {process.returncode}'}")


@torch.inference_mode()
def losses(setup: Setup, lm: LM) -> dict[str, list[float]]:
    """Return the mean token losses of the windows of each text."""
    found = {}
    for corpus in setup.corpora:
        every, count = texts.windows(corpus, lm.tokenizer, setup.context)
        chosen = np.linspace(0, count - 1, min(count, setup.windows)).round().astype(int)
        found[corpus] = [window_loss(lm.model, window[None]).item() for window in every[chosen]]
    return found


def measured(setup: Setup, name: str) -> dict[str, Any]:
    """Return everything about a contender."""
    if name == UNQUANTIZED:
        taken, lm = {"seconds": 0.0, "peak_bytes": None, "token_visits": 0}, setup.load()
    elif name.startswith(THEIRS):
        taken, lm = autoround(setup, int(name.removeprefix(THEIRS)))
    else:
        taken, lm = ours(setup, name)
    found = losses(setup, lm)
    perplexities = {corpus: statistics.perplexity(values) for corpus, values in found.items()}
    where = {"machine": cost.machine("cpu"), "code": cost.code()}
    return {**taken, "perplexity": perplexities, "losses": found, **where}


def paired(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return by how many per cent one's perplexity exceeds the other's, by text and over all."""
    parts = {
        corpus: np.asarray(one["losses"][corpus])[None] - np.asarray(values)[None]
        for corpus, values in other["losses"].items()
    }
    sets = {corpus: [part] for corpus, part in parts.items()} | {"all": list(parts.values())}
    tested = {name: statistics.paired_difference(found) for name, found in sets.items()}
    return {name: test and dataclasses.asdict(test.percent()) for name, test in tested.items()}


def told(found: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the tables."""
    rows, corpora = found["contenders"], found["settings"]["corpora"]
    width = max(map(len, ["contender", *rows])) + 2
    yield f"{'contender':<{width}}{'seconds':>10}{'visits':>10}" + "".join(f"{each:>14}" for each in corpora)
    for name, row in rows.items():
        figures = "".join(shown(row["perplexity"][each], 14, 3) for each in corpora)
        yield f"{name:<{width}}{shown(row['seconds'], 10, 1)}{row['token_visits']:>10}{figures}"
    for reference, others in found["paired"].items():
        if others:
            yield f"perplexity over {reference}'s, in per cent"
        for name, tests in others.items():
            cells = [
                f"{each} "
                + (
                    "-"
                    if test is None
                    else f"{test['mean']:+.2f} ({test['low']:+.2f} to {test['high']:+.2f})"
                )
                for each, test in tests.items()
            ]
            yield f"  {name}: " + ", ".join(cells)


def check_environment(python: str | None) -> None:
    """Raise UserError where there is no environment with auto-round."""
    way = f"pass --auto-round PYTHON or set {VARIABLE} ({SCRIPT.relative_to(ROOT)} says how to make one)"
    if python is None:
        raise UserError(f"AutoRound needs an environment of its own: {way}")
    command = [python, "-c", "from importlib.metadata import version; version('auto-round')"]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        raise UserError(f"{python} is no Python with auto-round: {way}") from None


def arguments_of(argv: list[str]) -> argparse.Namespace:
    """Return the parsed command line. Raises UserError for numbers that are out of range."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = {"samples": 64, "length": 256, "batch": 4, "windows": 64, "context": 512, "threads": 2}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--iterations", nargs="*", type=int, default=[50, 200])
    parser.add_argument("--settings", nargs="*", default=[], metavar="OVERRIDES", help="each in one word")
    parser.add_argument("--texts", nargs="+", default=["wikitext2", "c4-new", "python-docs"])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the contenders; all if not given")
    parser.add_argument("--auto-round", default=os.environ.get(VARIABLE), metavar="PYTHON")
    parser.add_argument("--compile", action="store_true", help="let auto-round use torch.compile")
    parser.add_argument("--folder", type=Path, help="for weights and stages; default: in TEQ_HOME")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", help="as for run.py; of all contenders")
    arguments = parser.parse_intermixed_args(argv)
    given = [(name, getattr(arguments, name)) for name in numbers]
    for name, value in given + [("iterations", value) for value in arguments.iterations]:
        if value < 1:
            raise UserError(f"--{name} {value} is not allowed: it must be at least 1")
    return arguments


def contenders(arguments: argparse.Namespace, setup: Setup) -> list[str]:
    """Return the contenders to measure. Raises UserError where one of them cannot be."""
    names = [UNQUANTIZED, *(f"{THEIRS}{each}" for each in arguments.iterations), *arguments.settings]
    for name in arguments.only or ():
        if name not in names:
            raise UserError(f"--only {name} is not allowed: it must be some of {', '.join(names)}")
    chosen = [name for name in names if name in (arguments.only or names)]
    for name in [name for name in chosen if name in arguments.settings]:
        found = config.jobs([*setup.overrides, *shlex.split(name), *CHEAP])
        grid = found[0].run.quantizer.grid
        if len(found) > 1 or grid is None or grid.unsearched != setup.calibration.grid:
            raise UserError(f"--settings {name!r} is not allowed: it must be one run with the grid of all")
    return chosen


def main(argv: list[str]) -> int:
    """Measure the missing contenders, print and write what all of them tell."""
    arguments = arguments_of(argv)
    windows = [f"gptq.samples={arguments.samples}", f"gptq.length={arguments.length}"]
    (base,) = config.jobs([*arguments.overrides, "method=gptq", *windows, *CHEAP, "dtype=float32"])
    setup = Setup(
        base=base.run,
        overrides=arguments.overrides,
        corpora=arguments.texts,
        python=arguments.auto_round,
        folder=(arguments.folder or config.home() / "benchmarks-autoround").absolute(),
        **{name: getattr(arguments, name) for name in ("windows", "context", "batch", "threads", "compile")},
    )
    if setup.calibration.grid.symmetric:
        raise UserError("symmetric=true is not allowed: auto-round's symmetric grid is not this project's")
    names = contenders(arguments, setup)
    found: dict[str, Any] = {"settings": setup.plain(), "contenders": {}}
    if arguments.json.is_file():
        found = measuring.read(arguments.json)
        if found["settings"] != json.loads(json.dumps(setup.plain())):
            raise UserError(f"{arguments.json} is of other settings: give another file")
    missing = [name for name in names if name not in found["contenders"]]
    if any(name.startswith(THEIRS) for name in missing):
        check_environment(setup.python)
    for corpus in setup.corpora:
        texts.provenance(corpus)
    torch.set_num_threads(setup.threads)
    for name in missing:
        found["contenders"][name] = measured(setup, name)
        rows = found["contenders"]
        found["paired"] = {
            reference: {other: paired(rows[other], rows[reference]) for other in rows if other != reference}
            for reference in rows
            if reference.startswith(THEIRS)
        }
        measuring.write(arguments.json, found)
    print("\n".join(told(found | {"paired": found.get("paired", {})})))
    return 0


if __name__ == "__main__":
    sys.exit(measuring.command_line(main, sys.argv[1:]))
