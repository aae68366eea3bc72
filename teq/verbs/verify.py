"""`python -m teq verify <folder>`: an exported folder, loaded by other code, has the numbers of its run.

What the folder holds must equal what was stored: codes, scales, zeros and all other tensors, to the bit. The
loader's weights must equal ours to the bit in its dtype, and its perplexities ours to 1e-6, or to 1e-3 where
it computes in another dtype than the run did.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from teq.config import ROOT
from teq.console import aligned
from teq.evaluate.reloaded import KINDS
from teq.export import formats, gguf, writer
from teq.export.plan import Plan
from teq.files import disk
from teq.files.digests import tensor_digest
from teq.models import Checkpoint
from teq.spec import UserError
from teq.verbs.export import arch_of, plan_of

TEXTS = ("tokens_sha256", "documents_sha256")
Load = Callable[[Path, Mapping[str, Any], Mapping[str, str]], dict[str, Any]]
SAME, OTHER = 1e-6, 1e-3  # relative tolerances of a perplexity in the run's dtype and in another


def main(argv: list[str]) -> int:
    """Print stored, reloaded and difference. Returns 1 where they differ by more than is tolerated."""
    parser = argparse.ArgumentParser(
        prog="python -m teq verify", description="Load an exported folder and compare it with its run."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--install", action="store_true", help="fetch the loader into the user's cache first")
    parser.add_argument("--skip-evaluations", action="store_true", help="compare tensors alone")
    try:
        given = parser.parse_args(argv)
    except SystemExit as stopped:
        return int(stopped.code or 0)
    found = verified(given.folder, given.install, not given.skip_evaluations)
    manifest, answer = found.manifest, found.answer
    versions = ", ".join(f"{name} {version}" for name, version in answer["versions"].items())
    print(
        f"{manifest['format']}: run in {_dtype(manifest)}, loaded in {answer['dtype']} as {answer['linear']}"
    )
    print(f"by {versions}")
    rows, off = _numbers(manifest, answer)
    if rows:
        print(aligned([["evaluation", "metric", "stored", "reloaded", "difference", "tolerated"], *rows]))
    for problem in (wrong := [*found.tensors, *off]):
        print(f"differs: {problem}")
    if not wrong:
        print(f"equal: {len(manifest['linears'])} linears, {len(manifest['tensors'])} other tensors")
    return 1 if wrong else 0


@dataclass(frozen=True)
class Verified:
    """A folder's manifest, what a loader found in it, and the tensors that differ."""

    manifest: dict[str, Any]
    answer: dict[str, Any]
    tensors: list[str]

    @property
    def wrong(self) -> list[str]:
        """Return the tensors, and the numbers, that differ by more than is tolerated."""
        return [*self.tensors, *_numbers(self.manifest, self.answer)[1]]


def verified(given: Path, install: bool, evaluate: bool, load: Load | None = None) -> Verified:
    """Load an exported folder, by `load` or in a process of its own, and compare its tensors.

    `load` gets the folder, a request and the variables of a process that finds the loader. Raises UserError.
    """
    folder = given.expanduser().absolute()
    manifest = writer.read_manifest(folder)
    source = writer.Exported(path=str(folder))
    run = manifest["run"]
    plan = plan_of(run, Checkpoint(name=run["model"]["name"], source=source, arch=arch_of(run)))
    answer = _answer(folder, manifest, plan, install, evaluate, load or loaded)
    return Verified(manifest, answer, [*_tensors(folder, manifest, plan, answer)])


def _dtype(manifest: Mapping[str, Any]) -> str:
    """Return the dtype that a run was evaluated in."""
    return manifest["run"].get("eval_dtype") or manifest["run"]["dtype"]


def _answer(
    folder: Path, manifest: Mapping[str, Any], plan: Plan, install: bool, evaluate: bool, load: Load
) -> dict[str, Any]:
    """Return what stock code finds in the folder."""
    form = formats.find(manifest["format"])
    loaders = disk.user_cache() / "loaders" / manifest["format"]
    if install:
        _install(form.INSTALL, loaders)
    fetching = f"`python -m teq verify {folder} --install` fetches it, for itself alone"
    formats.check_loader(manifest["format"], [str(loaders), *sys.path], fetching)
    known = [plain for plain in manifest["run"]["evals"] if plain["kind"] in KINDS and evaluate]
    request = {
        "evaluations": known,
        "linears": list(plan.shapes),
        "file": gguf.FILE if form is gguf else None,
        "dtype": manifest["dtype"],
    }
    paths = [str(loaders), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return load(folder, request, os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))})


def loaded(folder: Path, request: Mapping[str, Any], variables: Mapping[str, str]) -> dict[str, Any]:
    """Return the answer of a process that loads one folder. Raises UserError."""
    with tempfile.TemporaryDirectory() as temporary:
        asked = Path(temporary) / "request.json"
        asked.write_text(json.dumps(request))
        done = subprocess.run(
            [sys.executable, "-m", "teq.evaluate.reloaded", str(folder), str(asked)],
            env=variables,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        last = (done.stderr.strip() or "it ended without a word").splitlines()[-1]
        raise UserError(f"{folder} could not be loaded and measured: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def _install(requirements: Sequence[str], into: Path) -> None:
    """Install a loader for `verify` alone, on the libraries that are here. Raises UserError."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*command, "--upgrade", "--target", str(into), *requirements],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        raise UserError(f"{requirements[0]} could not be installed ({lines[-1]})")


def _tensors(
    folder: Path, manifest: Mapping[str, Any], plan: Plan, answer: Mapping[str, Any]
) -> Iterator[str]:
    """Yield what in the folder, or in the loaded model, is other than what was stored."""
    import torch

    try:
        for name, linear in writer.read(plan, manifest["format"], folder):
            found, stored = writer.digests(linear, plan.grid.bits), manifest["linears"][name]
            if other := [part for part in found | stored if found.get(part) != stored.get(part)]:
                yield f"{name}: {', '.join(other)} in the folder"
            weight = answer["weights"][name]
            if (
                tensor_digest(linear.dequantize(plan.grid).to(getattr(torch, weight["dtype"])))
                != weight["digest"]
            ):
                yield f"{name}: the weight as loaded ({weight['dtype']})"
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{folder} has no readable weights: {disk.one_line(error)}") from error
    for name, stored in manifest["tensors"].items():
        if answer["tensors"].get(name) != stored:
            yield f"{name}: as loaded"


def _numbers(manifest: Mapping[str, Any], answer: Mapping[str, Any]) -> tuple[list[list[str]], list[str]]:
    """Return the rows of the table, and what differs by more than is tolerated."""
    rows, wrong = [], []
    same = answer["dtype"] == _dtype(manifest)
    for name, found in answer["metrics"].items():
        stored = manifest["metrics"][name]
        if any(found["info"].get(key) != stored["info"].get(key) for key in TEXTS):
            wrong.append(f"{name}: the text or its tokens")
        shared = (metric for metric in found["values"] if metric in stored["values"])
        for metric in (metric for metric in shared if not metric.endswith("_stderr")):
            before, after = stored["values"][metric], found["values"][metric]
            loss = metric in ("ppl", "bits_per_byte")
            tolerated = SAME if same else OTHER if loss else None  # single documents may tip over
            change = abs(after - before) / abs(before) if before else abs(after)
            shown = "any" if tolerated is None else f"{tolerated:.0e}"
            rows.append([name, metric, f"{before:.6f}", f"{after:.6f}", f"{change:.1e}", shown])
            if tolerated is not None and not change <= tolerated:
                wrong.append(f"{name}: {metric}")
    return rows, wrong
