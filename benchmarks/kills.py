"""Nothing computed is lost: sweeps that are killed at random moments and started again, over and over.

    python -m benchmarks.kills --json benchmarks/results/kills.json [--kills 50] [--seed 0] [overrides]

Each sweep first runs undisturbed. Then processes that run it are killed by SIGKILL, SIGTERM, SIGINT, or a
disk that fills up under them (where a small one can be mounted), and the same command is started again until
the sweep is finished, which is a round. At a round's end its artefacts, metrics and records must equal the
undisturbed ones to the bit, seconds and dates apart. And no stage, GPTQ block, window, batch or step may have
been computed again after its store had returned: the child process notes both, on disk, around the functions
that compute and those that store. A training's state is written after every step, not once a minute, so that
kills hit writes. Overrides stand for one sweep instead of the two that are built in.
"""

import argparse
import functools
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.contenders import measuring
from teq.files.disk import sha256
from teq.pipeline import cost

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["train.length=64", "gptq.length=64", "ppl.context=64", "device=cpu"]
TINY = ["-m", "model=tiny-llama,tiny-opt", "method=rtn,gptq,teq,teq+gptq", "train.steps=12", "gptq.samples=8"]
TINY += ["ppl.limit=8", "evals=[python-docs,lastword-python-docs]"]
SMOLLM2 = ["-m", "model=smollm2-135m", "method=teq+gptq", "train.steps=6", "gptq.samples=4", "ppl.limit=8"]
SMOLLM2 += ["evals=[python-docs]"]
SWEEPS = {"tiny": [*TINY, *SMALL], "smollm2": [*SMOLLM2, *SMALL]}
SIGNALS = {"SIGKILL": -signal.SIGKILL, "SIGTERM": 128 + signal.SIGTERM, "SIGINT": 128 + signal.SIGINT}
FULL_DISK = "ENOSPC"
DISK = 400  # megabytes
SHARE = 0.3  # of an undisturbed sweep's notes: so many a process writes at most before it is killed
DELAY = 0.2  # seconds after a note, at most: kills hit what comes between two notes
PATIENCE = 1800.0  # seconds for a process that nobody kills


class Notes:
    """What a child process began to compute and what it has stored, a line on disk before it continues."""

    def __init__(self, file: Path) -> None:
        self.stream = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.stage = self.piece = ""
        self.steps = 0

    def begin(self, piece: str) -> None:
        """A piece of the present stage is about to be computed; "" is the stage itself."""
        self.piece = f"{self.stage} {piece}".strip()
        self._note("begin", self.piece)

    def stored(self, piece: str | None = None) -> None:
        """The store of a piece, the last begun if not given, has returned."""
        self._note("stored", self.piece if piece is None else f"{self.stage} {piece}".strip())

    def _note(self, event: str, what: str) -> None:
        os.write(self.stream, (json.dumps([event, what]) + "\n").encode())
        os.fsync(self.stream)


def child(file: Path, argv: list[str]) -> int:
    """run.py with notes around what computes and what stores."""
    from torch._subclasses.fake_tensor import FakeTensor

    import run
    from teq.evaluate import perplexity, scoring, trees
    from teq.files import resume
    from teq.pipeline.store import Store
    from teq.quantizers.gptq import blocks
    from teq.transforms.teq import train

    notes = Notes(file)

    def stage(original: Callable[..., Any], self: Store, folder: Path, asked: Any, *rest: Any) -> Any:
        notes.stage, notes.steps = f"{asked.name} {asked.key}", 0
        notes.begin("")
        made = original(self, folder, asked, *rest)
        notes.stored("")
        return made

    def block(original: Callable[..., Any], *given: Any) -> Any:
        notes.begin(f"block {given[-1].folded.name}")
        return original(*given)

    def batch(original: Callable[..., Any], self: Any, rows: list[Any]) -> Any:
        notes.begin(f"batch {_digest(sorted(trees.requests_of(rows)))}")
        return original(self, rows)

    def window(original: Callable[..., Any], model: Any, tokens: Any) -> Any:
        notes.begin(f"window {_digest(tokens.tolist())}")
        return original(model, tokens)

    def step(original: Callable[..., Any], self: Any, loss: Any, number: int) -> None:
        if not isinstance(loss, FakeTensor):  # those of the memory's prediction
            notes.begin(f"step {number}")
        original(self, loss, number)

    def kept(original: Callable[..., Any], self: Any, *given: Any) -> Any:
        made = original(self, *given)
        if not self.waiting:  # what a full disk refuses waits
            notes.stored()
        return made

    def state(original: Callable[..., Any], self: Any) -> None:
        original(self)
        for number in range(notes.steps, self.written):
            notes.stored(f"step {number}")
        notes.steps = max(notes.steps, self.written)

    around = [
        (Store, "_make", stage),
        (blocks, "_quantize_block", block),
        (scoring.SharedContextLM, "_score", batch),
        (perplexity, "window_loss", window),
        (train.Trainer, "move", step),
        (resume.BlockFiles, "write", kept),
        (resume.Journal, "append", kept),
        (resume.ResumeFile, "write", state),
    ]
    for owner, name, wrapper in around:
        setattr(owner, name, _around(wrapper, getattr(owner, name)))
    resume.SECONDS = 0
    return run.main(argv)


def _around(wrapper: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapped(*given: Any) -> Any:
        return wrapper(original, *given)

    return wrapped


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


@dataclass
class Sweep:
    """A sweep's present round: its home, notes, and how often it was killed."""

    name: str
    argv: list[str]
    folder: Path
    expected: dict[str, Any] = field(default_factory=dict)
    total: int = 0  # notes of an undisturbed round
    round: int = 0
    kills: int = 0

    @property
    def home(self) -> Path:
        """This round's TEQ_HOME."""
        return self.folder / f"{self.name}-{self.round}"

    @property
    def notes(self) -> Path:
        """This round's notes, outside the disk that fills up."""
        return self.folder.parent / f"{self.name}-{self.round}.notes"


class Process:
    """A child process that runs a sweep in its round's home."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.before = self._count()
        self.log = sweep.folder.parent / "log"
        command = [sys.executable, "-m", "benchmarks.kills", "--child", str(sweep.notes), *sweep.argv]
        variables = {"TEQ_HOME": str(sweep.home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with self.log.open("wb") as log:
            self.popen = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **variables}, stdout=log, stderr=log
            )

    def reaches(self, notes: int, delay: float) -> bool:
        """Whether the process still runs so many seconds after it wrote so many notes."""
        while self.popen.poll() is None:
            if self._count() - self.before >= notes:
                time.sleep(delay)
                return self.popen.poll() is None
            time.sleep(0.002)
        return False

    def _count(self) -> int:
        return self.sweep.notes.read_bytes().count(b"\n") if self.sweep.notes.exists() else 0

    def end(self) -> tuple[int, str]:
        """Wait for the end; exit status and output."""
        return self.popen.wait(PATIENCE), self.log.read_text(errors="replace")


def results(home: Path) -> dict[str, Any]:
    """What a home holds, without seconds and dates: files of the artefacts by digest, records."""
    found: dict[str, Any] = {}
    for file in sorted(home.glob("store/*/*/manifest.json")):
        if "." in file.parent.name:  # unfinished
            continue
        for name, digest in json.loads(file.read_text())["files"].items():
            assert sha256(file.parent / name) == digest, file.parent / name
            found[f"{file.parent.parent.name}/{file.parent.name}/{name}"] = digest
    for file in sorted(home.glob("records/*.json")):
        data = json.loads(file.read_text())
        for name in ("created", "code", "machine"):
            del data[name]
        stages = {name: [stage["key"], stage["digest"]] for name, stage in data["stages"].items()}
        found[f"records/{file.name}"] = data | {"stages": stages}
    return found


def computed_twice(lines: Iterable[str]) -> list[str]:
    """What was begun after its store had returned."""
    stored, twice = set(), []
    for line in lines:
        event, what = json.loads(line)
        if event == "stored":
            stored.add(what)
        elif what in stored:
            twice.append(what)
    return twice


def pieces(lines: Iterable[str]) -> dict[str, dict[str, int]]:
    """By kind of piece: how many there are, and how many were begun."""
    begun = Counter(what for event, what in map(json.loads, lines) if event == "begin")
    found: dict[str, dict[str, int]] = {}
    for what, times in begun.items():
        kind = [*what.split(), "stage"][2]
        entry = found.setdefault(kind, {"pieces": 0, "begun": 0})
        entry["pieces"], entry["begun"] = entry["pieces"] + 1, entry["begun"] + times
    return found


def fill(folder: Path) -> Path:
    """Fill the disk of `folder`; returns the file that does."""
    file = folder / "filler"
    with file.open("wb", buffering=0) as stream:
        for size in (2**20, 2**12, 1):
            try:
                while True:
                    stream.write(bytes(size))
            except OSError:
                continue
    return file


def kill(sweep: Sweep, kind: str, notes: int, delay: float) -> dict[str, Any]:
    """Start the sweep, and stop it so many seconds after so many notes; kind `none` where it ends before."""
    process, filler = Process(sweep), None
    if kind != "none" and process.reaches(notes, delay):
        if kind == FULL_DISK:
            filler = fill(sweep.folder)
        else:
            process.popen.send_signal(getattr(signal, kind))
    else:
        kind = "none"
    status, said = process.end()
    if filler is not None:
        filler.unlink()
    allowed = {"none": [0], FULL_DISK: [0, 1]}.get(kind) or [SIGNALS[kind], 0]
    last = said.strip().splitlines()[-1:]
    if kind in SIGNALS and last and " records in " in last[0]:  # run.py was over, Python was not
        allowed.append(-getattr(signal, kind))
    problems = [] if status in allowed else [f"exit status {status}"]
    if "Traceback" in said or "Logging error" in said:
        problems.append("a traceback")
    found = {"sweep": sweep.name, "round": sweep.round, "kind": kind}
    found |= {"notes": notes, "delay": round(delay, 3)}
    found |= {"status": status, "problems": problems, "said": last}
    if problems:
        found["output"] = said[-3000:]
    return found


def finished(sweep: Sweep) -> dict[str, Any]:
    """What a finished round has to show; the next one begins."""
    lines, found = sweep.notes.read_text().splitlines(), results(sweep.home)
    expected = sweep.expected
    differing = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    shown = {
        "sweep": sweep.name,
        "round": sweep.round,
        "kills": sweep.kills,
        "compared": len(expected),
        "differing": differing,
        "computed_twice": computed_twice(lines),
        "pieces": pieces(lines),
    }
    subprocess.run(["rm", "-rf", str(sweep.home)], check=True)
    sweep.round, sweep.kills = sweep.round + 1, 0
    return shown


def campaign(sweeps: dict[str, list[str]], kills: int, seed: int, folder: Path, file: Path) -> dict[str, Any]:
    """Kill the sweeps so often; everything is written to `file` as it comes."""
    disk = folder / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "tmpfs", str(disk)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    kinds = [*SIGNALS, *([FULL_DISK] if mounted else [])]
    report: dict[str, Any] = {"seed": seed, "kinds": kinds, "sweeps": sweeps, "kills": [], "rounds": []}
    report |= {"code": cost.code(), "machine": cost.machine("cpu")}
    draw = random.Random(seed)
    begun = time.monotonic()

    def write() -> None:
        made = [each for each in report["kills"] if each["kind"] != "none"]
        report["made"] = dict(Counter(each["kind"] for each in made))
        bad = [each for each in report["rounds"] if each["differing"] or each["computed_twice"]]
        report["problems"] = len(bad) + sum(bool(each["problems"]) for each in report["kills"])
        report["seconds"] = round(time.monotonic() - begun)
        measuring.write(file, report)

    try:
        states = [Sweep(name, argv, disk) for name, argv in sweeps.items()]
        for sweep in states:
            status, said = Process(sweep).end()
            if status:
                raise measuring.UserError(f"{sweep.name} fails undisturbed: {said[-3000:]}")
            sweep.expected = results(sweep.home)
            sweep.total = sweep.notes.read_bytes().count(b"\n")
            report["rounds"].append(finished(sweep))
            print(f"{sweep.name}: {sweep.total} notes undisturbed", file=sys.stderr, flush=True)
        while (made := sum(each["kind"] != "none" for each in report["kills"])) < kills:
            sweep = draw.choice(states)
            kind = kinds[made % len(kinds)]
            notes = draw.randint(1, max(1, int(SHARE * sweep.total)))
            one = kill(sweep, kind, notes, draw.uniform(0, DELAY))
            report["kills"].append(one)
            sweep.kills += one["kind"] != "none"
            if one["status"] == 0:
                report["rounds"].append(finished(sweep))
            write()
            print(f"{made + 1}: {json.dumps(one)}", file=sys.stderr, flush=True)
        for sweep in states:
            if sweep.kills:
                report["kills"].append(kill(sweep, "none", 0, 0.0))
                report["rounds"].append(finished(sweep))
                write()
        return report
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(disk)], check=True)


def main(argv: list[str]) -> int:
    """Run the campaign and print what came of it. Returns 1 where something was lost."""
    if argv[:1] == ["--child"]:
        return child(Path(argv[1]), argv[2:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", help="one sweep, as for run.py -m")
    arguments = parser.parse_intermixed_args(argv)
    sweeps = {"given": ["-m", *arguments.overrides]} if arguments.overrides else SWEEPS
    with tempfile.TemporaryDirectory() as folder:
        report = campaign(sweeps, arguments.kills, arguments.seed, Path(folder), arguments.json)
    ended = [each for each in report["rounds"] if each["kills"]]
    compared = sum(each["compared"] for each in ended)
    print(
        f"{sum(report['made'].values())} kills ({', '.join(f'{n} {k}' for k, n in report['made'].items())}), "
        f"{len(ended)} rounds with kills, {compared} files compared, {report['problems']} problems"
    )
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(measuring.command_line(main, sys.argv[1:]))
