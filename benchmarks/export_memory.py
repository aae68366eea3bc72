"""Peak memory and seconds of an export at a true size, against reading its bytes and writing its result.

    python -m benchmarks.export_memory [--turns 3] [--work FOLDER] [--json FILE] [OVERRIDE ...]

The default is OPT-1.3B in bfloat16, RTN to 4 bits in groups of 128. A folder of safetensors (random weights)
and its stored run are made in --work, a temporary folder by default. In each turn a process exports the run
to compressed-tensors; its anonymous memory is that over what it held after its imports, read every 2 ms. Then
the bytes that it needed, the run's artefact and the tensors that are not quantized, are read, and files as
large as its result are written, each with fsync. Both start with nothing of these files in the page cache.
Seconds start after the imports; the digest of the model's folder is known, as after any run.
"""

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.contenders import measuring
from teq import config
from teq.export.plan import Plan
from teq.pipeline import cost
from teq.pipeline.store import DATA
from teq.spec import UserError
from teq.verbs import export

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "export_memory.json"
MODEL = ["model=opt-1.3b", "bits=4", "group_size=128"]
RUN = ["method=rtn", "dtype=bfloat16", "device=cpu", "evals=[python-docs]", "ppl.limit=1", "ppl.context=128"]
ALLOWED = 500_000_000  # bytes over the largest block and the embeddings
SHARD = "500MB"
CHUNK = 2**24


def write_model(overrides: list[str], folder: str) -> None:
    """Write a folder with random weights of the model's size, in bfloat16."""
    (job,) = config.jobs([*overrides, *RUN, "model.weights=synthetic"])
    source = job.run.model.source
    source.model("bfloat16", "cpu", "cpu").save_pretrained(folder, max_shard_size=SHARD)
    source.tokenizer().save_pretrained(folder)


def run_export(argv: list[str], to: str, home: str, parent: Connection) -> None:
    """Export once the parent says so, and send it the seconds. What is imported on the way is so before."""
    os.environ["TEQ_HOME"] = home
    (job,) = config.jobs(argv)
    plan = export.plan_of(job.run.plain(), job.run.model)
    plan.checkpoint.tokenizer()
    plan.checkpoint.source.tensors(plan.dtype)
    assert plan.shapes
    parent.send(None)
    parent.recv()
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        export.main([*argv, "--to", to])
    parent.send(time.perf_counter() - start)


def exported(argv: list[str], to: Path, home: Path, cold: Iterable[Path]) -> dict[str, Any]:
    """Return seconds and peak bytes of an export in a process of its own. Raises UserError where it fails."""
    spawning = get_context("spawn")
    here, there = spawning.Pipe()
    process = spawning.Process(target=run_export, args=(argv, str(to), str(home), there))
    process.start()
    there.close()
    try:
        here.recv()
        forget(cold)
        base = peak = anonymous(process.pid)
        here.send(None)
        while not here.poll(0.002):
            peak = max(peak, anonymous(process.pid))
        return {"export": here.recv(), "peak_bytes": peak - base, "imports_bytes": base}
    except (EOFError, FileNotFoundError, KeyError):
        raise UserError("the run could not be exported") from None
    finally:
        process.join()


def anonymous(process: int | None) -> int:
    """Return the bytes of anonymous memory that a process holds now."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)["RssAnon"].split()[0]) * 1024


def forget(files: Iterable[Path]) -> None:
    """Drop files from the page cache."""
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_seconds(artefact: Path, plan: Plan) -> float:
    """Return the seconds of reading what an export needs."""
    names = [n for part in plan.names for n in part if n.removesuffix(".weight") not in plan.shapes]
    tensors = plan.checkpoint.source.tensors(plan.dtype)
    start = time.perf_counter()
    with artefact.open("rb") as stream:
        while stream.read(CHUNK):
            pass
    for name in names:
        tensors[name].clone()
    return time.perf_counter() - start


def write_seconds(result: Path, to: Path) -> float:
    """Return the seconds of writing files as large as those of a result."""
    contents = {file.name: file.read_bytes() for file in result.iterdir()}
    to.mkdir()
    start = time.perf_counter()
    for name, content in contents.items():
        with (to / name).open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    return time.perf_counter() - start


def sizes(plan: Plan) -> dict[str, int]:
    """Return the bytes of the largest block, of what is outside the blocks, and of the model."""
    state = plan.outline.state_dict()
    outside, *blocks = (
        sum(2 * state[name].numel() for name in part)  # bfloat16
        for part in plan.names
    )
    return {"block": max(blocks), "embeddings": outside, "model": outside + sum(blocks)}


def turn(argv: list[str], artefact: Path, plan: Plan, work: Path) -> dict[str, Any]:
    """Return what one export took, and what reading and writing the same bytes did."""
    cold = [artefact, *plan.checkpoint.source.folder().glob("*.safetensors")]
    result, again = work / "result", work / "again"
    for folder in (result, again):
        shutil.rmtree(folder, ignore_errors=True)
    found = exported(argv, result, work / "home", cold)
    forget(cold)
    found |= {"read": read_seconds(artefact, plan), "write": write_seconds(result, again)}
    written = sum(file.stat().st_size for file in result.iterdir())
    return found | {"written_bytes": written, "ratio": found["export"] / (found["read"] + found["write"])}


def main(argv: list[str]) -> int:
    """Measure, print and write the JSON. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", default=MODEL, help="model, bits and group size")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--work", type=Path, help="kept: the model and its run are made there once")
    parser.add_argument("--json", type=Path, default=RESULTS)
    given = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        work = given.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        found = measured(given.overrides, given.turns, work.absolute())
    measuring.write(given.json, found)
    peak, allowed = (found[key] / 1e9 for key in ("peak_bytes", "allowed_bytes"))
    print(
        f"peak: {peak:.2f} GB of {allowed:.2f} allowed; the model is {found['sizes']['model'] / 1e9:.2f} GB"
    )
    print(f"seconds: {found['seconds']:.1f}, {found['ratio']:.2f} of reading and writing (median)")
    return 0


def measured(overrides: list[str], turns: int, work: Path) -> dict[str, Any]:
    """Return all turns of one model in the folder `work`."""
    folder = work / "model"
    if not folder.is_dir():
        work.mkdir(parents=True, exist_ok=True)
        alone(write_model, overrides, str(folder))
    told = [*overrides, *RUN, f"model.path={folder}"]
    command = [sys.executable, str(ROOT / "run.py"), *told]
    subprocess.run(command, env=os.environ | {"TEQ_HOME": str(work / "home")}, check=True, stdout=sys.stderr)
    (job,) = config.jobs(told)
    plan = export.plan_of(job.run.plain(), job.run.model)
    (artefact,) = (work / "home" / "store" / "weights").glob(f"*/{DATA}")
    found = [turn(told, artefact, plan, work) for _ in range(turns)]
    limits = sizes(plan)
    return {
        "overrides": told[:-1],
        "sizes": limits | {"artefact": artefact.stat().st_size, "written": found[0]["written_bytes"]},
        "turns": found,
        "peak_bytes": max(one["peak_bytes"] for one in found),
        "allowed_bytes": limits["block"] + limits["embeddings"] + ALLOWED,
        "seconds": statistics.median(one["export"] for one in found),
        "ratio": statistics.median(one["ratio"] for one in found),
        "machine": cost.machine("cpu"),
        "code": cost.code(),
    }


def alone(work: Callable[..., None], *arguments: Any) -> None:
    """Do work in a process of its own, which takes its memory with it. Raises UserError where it fails."""
    process = get_context("spawn").Process(target=work, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise UserError(f"{work.__name__} ended with {process.exitcode}")


if __name__ == "__main__":
    sys.exit(measuring.command_line(main, sys.argv[1:]))
