"""Eight small runs for the tests of clusters: how they are started and what must be left of them."""

import os
import re
import subprocess
import sys
import time
from collections import Counter
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from benchmarks import kills

ROOT = Path(__file__).resolve().parent.parent
# side by side two runs that share trained scales
SWEEP = ["-m", "model=tiny-llama", "grid=w3_g64,w4_g64", "method=teq,teq+gptq,gptq,rtn", "device=cpu"]
SWEEP += ["train.steps=60", "train.length=64", "gptq.samples=4", "gptq.length=64"]
SWEEP += ["evals=[python-docs]", "ppl.context=64", "ppl.limit=4"]
RUNS = 8
DATED = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ")


def start(home: Path, *overrides: str, **environment: str) -> subprocess.Popen[str]:
    """Start the sweep in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *SWEEP, *overrides],
        env={**os.environ, "TEQ_HOME": str(home), "OMP_NUM_THREADS": "1", **environment},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def logged(folder: Path, what: str) -> Counter[str]:
    """How often each stage's line ends with `what` in the logs of the jobs under a folder."""
    text = "".join(file.read_text() for file in folder.rglob("run.log"))
    return Counter(re.findall(rf"(\w+ [0-9a-f]{{16}}): {what}", text))


def computing(sweep: subprocess.Popen[str], home: Path) -> tuple[int, int]:
    """Return process and number of the first job that computes a stage."""
    while sweep.poll() is None:
        for note in home.glob("hydra/*/working/*-*"):
            process, _, number = note.name.partition("-")
            if logged(note.parent.parent / number, "computing"):
                return int(process), int(number)
        time.sleep(0.1)
    raise AssertionError(f"the sweep ended before a job began: {sweep.communicate()[0]}")


def waited(folder: Path) -> float:
    """Return the seconds that the jobs under a folder waited for a stage that another one computed."""
    seconds = 0.0
    for file in folder.rglob("run.log"):
        lines = [line for line in file.read_text().splitlines() if DATED.match(line)]
        for line, following in pairwise(lines):
            if line.endswith("another process is computing it, waiting"):
                begun, ended = (
                    datetime.fromisoformat(each[:23].replace(",", ".")) for each in (line, following)
                )
                seconds += (ended - begun).total_seconds()
    return seconds


def check(home: Path, undisturbed: Path) -> None:
    """Assert that every record, code and metric is that of one process.

    And that nothing was made twice, and no job waited for another one while it held a processor.
    """
    assert waited(home / "hydra") == 0
    found = kills.results(home)
    assert found == kills.results(undisturbed)
    assert sum(name.startswith("records/") for name in found) == RUNS
    done = logged(home / "hydra", "done in")
    assert len(done) == len(list(home.glob("store/*/*/manifest.json"))) and set(done.values()) == {1}
