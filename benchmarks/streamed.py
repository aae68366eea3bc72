"""A whole run with memory=stream against the same run without: anonymous bytes, seconds, bits.

    python -m benchmarks.streamed --json benchmarks/results/streamed.json [--folder FOLDER]
        [--models opt-1.3b=1.5 bloom-3b=2.5] [--blocks N] [overrides]

Each model is written to FOLDER as safetensors first: synthetic weights of its true size in bf16, or of its
first N blocks, which take as much memory when they are streamed, and less time. run.py then
takes it through teq+gptq (w4_g128, 2 steps of 128 tokens, 4 GPTQ windows of 256) and perplexity (4 windows of
512), streamed and not, each in a home of its own. `overrides` belong to both.

The number after a model's name are the gigabytes that the streamed run may take: RssAnon over what its
interpreter holds once everything is imported, the model's own code too, looked at every 10 ms; page cache is
not counted. Where memory cgroups can be made it also runs in one that does not give more than that and the
interpreter's own: what exceeds it is killed. Every stage's digests are compared: the results must be equal to
the bit.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.contenders import measuring
from teq import config
from teq.console import aligned
from teq.models.synthetic import Synthetic
from teq.pipeline import cost
from teq.spec import UserError

ROOT = Path(__file__).resolve().parents[1]
CGROUPS = Path("/sys/fs/cgroup")
OWN = """
import sys, torch, accelerate, hydra, teq.verbs.run, teq.transforms.teq.train
from transformers import AutoConfig, AutoModelForCausalLM
with torch.device("meta"):
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1]))
print(open("/proc/self/status").read())
"""
RUN = [
    *(
        "method=teq+gptq",
        "grid=w4_g128",
        "dtype=bfloat16",
        "recipe=quick",
        "train.steps=2",
        "train.length=128",
    ),
    *("gptq.samples=4", "gptq.length=256", "evals=[python-docs]", "ppl.context=512", "ppl.limit=4"),
    "device=cpu",
]
DEPTH = {"opt": "num_hidden_layers", "bloom": "n_layer", "llama": "num_hidden_layers"}
SECONDS_BETWEEN = 0.01


def main(argv: Sequence[str]) -> int:
    """Measure what is missing in --json, and print it. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "teq-streamed")
    parser.add_argument("--models", nargs="+", default=["opt-1.3b=1.5", "bloom-3b=2.5"])
    parser.add_argument("--blocks", type=int)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args(argv)
    found = measuring.read(arguments.json) if arguments.json.is_file() else {"models": {}}
    machine = cost.machine("cpu")
    if found.setdefault("machine", machine) != machine:
        raise UserError(f"{arguments.json} was measured on another machine: give another --json")
    for each in arguments.models:
        name, _, bound = each.partition("=")
        title = name if arguments.blocks is None else f"{name}, {arguments.blocks} blocks"
        if title in found["models"]:
            continue
        folder = written(
            name, arguments.blocks, arguments.folder / title.replace(", ", "-").replace(" ", "-")
        )
        own = interpreter(folder)
        result: dict[str, Any] = {"interpreter_bytes": own, "bound_bytes": int(float(bound) * 1e9)}
        for memory in ("stream", "keep"):
            limit = result["bound_bytes"] + own if memory == "stream" else None
            result[memory] = measured(
                folder, memory, arguments.folder / "home" / folder.name, limit, arguments.overrides
            )
        result["equal"] = result["stream"]["digests"] == result["keep"]["digests"]
        found["models"][title] = result | {"code": cost.code()}
        measuring.write(arguments.json, found)
    print(table(found["models"]))
    wrong = [
        name for name, one in found["models"].items() if not one["equal"] or over(one) > one["bound_bytes"]
    ]
    return measuring.INCOMPLETE if wrong else 0


def written(name: str, blocks: int | None, folder: Path) -> Path:
    """Return a folder with the model's synthetic weights in bf16 and a tokenizer, made if it is not there."""
    if not (folder / "tokenizer.json").is_file():
        (job,) = config.jobs([f"model={name}", "model.weights=synthetic", "method=fp", "recipe=quick"])
        source = job.run.model.source
        assert isinstance(source, Synthetic)
        if blocks is not None:
            depth = DEPTH[source.config["model_type"]]
            source = dataclasses.replace(source, config={**source.config, depth: blocks})
        source.model("bfloat16", "cpu", "cpu").save_pretrained(folder, max_shard_size="1GB")
        source.tokenizer().save_pretrained(folder)
    return folder


def interpreter(folder: Path) -> int:
    """Return the anonymous bytes of a process that has imported what a run of the folder's model does."""
    said = subprocess.run(
        [sys.executable, "-c", OWN, str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return anonymous(said.stdout)


def anonymous(status: str) -> int:
    """Return the bytes of RssAnon in the text of /proc/<pid>/status; 0 where the process has ended."""
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if "RssAnon" in line), 0)


def measured(
    folder: Path, memory: str, home: Path, limit: int | None, overrides: Sequence[str]
) -> dict[str, Any]:
    """Run it; return peak anonymous bytes, and seconds and digest of every stage. Raises UserError."""
    home = home / memory
    words = ["model=auto", f"model.path={folder}", *RUN, f"memory={memory}", *overrides]
    with cgroup(limit) as joined, tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            ["sh", "-c", f'{joined}exec "$0" "$@"', sys.executable, str(ROOT / "run.py"), *words],
            env={**os.environ, "TEQ_HOME": str(home)},
            stdout=log,
            stderr=log,
        )
        peak, killed = 0, False
        while process.poll() is None:
            with contextlib.suppress(OSError):
                peak = max(peak, anonymous(Path(f"/proc/{process.pid}/status").read_text()))
            if limit is not None and peak > limit and not killed:
                process.kill()
                killed = True
            time.sleep(SECONDS_BETWEEN)
        log.seek(0)
        if process.returncode:
            tail = " ".join(log.read().splitlines()[-2:])
            raise UserError(f"memory={memory} ended with {process.returncode} at {peak / 1e9:.2f} GB: {tail}")
    (file,) = (home / "records").glob("*.json")
    stages = json.loads(file.read_text())["stages"]
    return {
        "peak_bytes": peak,
        "seconds": {name: one["cost"]["seconds"] for name, one in stages.items()},
        "digests": {name: one["digest"] for name, one in stages.items()},
        "cgroup": bool(joined),
    }


@contextlib.contextmanager
def cgroup(limit: int | None) -> Iterator[str]:
    """Context manager: a memory cgroup of `limit` bytes, as a shell command that joins it; empty without."""
    first = CGROUPS / "memory" if (CGROUPS / "memory").is_dir() else CGROUPS
    group = first / f"teq-{os.getpid()}"
    name = "memory.limit_in_bytes" if first != CGROUPS else "memory.max"
    made = ""
    if limit is not None:
        with contextlib.suppress(OSError):
            group.mkdir()
            (group / name).write_text(str(limit))
            made = f"echo $$ > {group}/cgroup.procs && "
    try:
        yield made
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()


def over(one: dict[str, Any]) -> int:
    """Return the peak of the streamed run over the interpreter's own bytes."""
    return int(one["stream"]["peak_bytes"] - one["interpreter_bytes"])


def table(models: dict[str, Any]) -> str:
    """Return a table of all models."""
    rows = [
        ["model", "anonymous GB, streamed", "bound", "in memory", "seconds, streamed / in memory", "bits"]
    ]
    for name, one in models.items():
        took = {m: sum(one[m]["seconds"].values()) for m in ("stream", "keep")}
        rows.append(
            [
                name,
                f"{over(one) / 1e9:.2f}",
                f"{one['bound_bytes'] / 1e9:.2f}",
                f"{(one['keep']['peak_bytes'] - one['interpreter_bytes']) / 1e9:.2f}",
                f"{took['stream'] / took['keep']:.2f} ({took['stream']:.0f} s, {took['keep']:.0f} s)",
                "equal" if one["equal"] else "different",
            ]
        )
    return aligned(rows)


if __name__ == "__main__":
    sys.exit(measuring.command_line(main, sys.argv[1:]))
