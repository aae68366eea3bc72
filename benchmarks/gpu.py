"""Measure everything on one GPU for one model at its true size, with synthetic weights.

    python -m benchmarks.gpu MODEL [--device cuda] [--folder FOLDER] [--neural-compressor PYTHON] [overrides]

Runs each part in its own process, one after another: teq_step at every number of --tokens, gptq, scaling on
this model, and the model's row of Table 5 (`run.py experiments=table5`) with a text that needs no download.
FOLDER/MODEL.json collects the results. A part that was measured with the same command and the same code is
not run again; a part that fails is one line, the others still run, and the next invocation retries it.
Overrides are passed to every part except scaling, which takes none.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.contenders import measuring
from benchmarks.contenders.measuring import shown
from teq import config, record
from teq.pipeline import cost as measure
from teq.spec import UserError

ROOT = Path(__file__).resolve().parents[1]
TEXT = ["calib.corpus=python-docs", "evals=[python-docs]", "ppl.limit=1"]  # what it says does not matter
# seconds of Table 5 that are to be reached on an 80 GB GPU, with TEQ and with GPTQ, and TEQ's bytes
TARGETS = {
    "opt-6.7b": {"teq": 120, "gptq": 300},
    "llama-7b": {"teq": 120, "gptq": 300},
    "opt-13b": {"teq": 250, "teq bytes": 40 * 10**9},
    "llama-13b": {"teq": 250, "teq bytes": 40 * 10**9},
}


def commands(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Return the module or script of every part and its arguments, as Python takes them."""
    model = [f"model={arguments.model}", "model.weights=synthetic", *arguments.overrides]
    device, repeats = ["--device", arguments.device], ["--repeats", str(arguments.repeats)]
    other = ["--neural-compressor", str(arguments.neural_compressor)] if arguments.neural_compressor else []
    chosen = ["--contenders", *arguments.contenders] if arguments.contenders else []
    step = [*device, *repeats, *other, *chosen, "--"]
    parts = {
        f"teq_step {count}": ["-m", "benchmarks.teq_step", "--tokens", str(count), *step]
        for count in arguments.tokens
    }
    calibration = ["--samples", str(arguments.samples), "--length", str(arguments.length)]
    parts["gptq"] = ["-m", "benchmarks.gptq", *calibration, *device, "--repeats", str(arguments.gptq_repeats)]
    parts["gptq"] += ["--windows", "0", "--"]
    scaling = ["--models", arguments.model, "--tokens", *map(str, arguments.scaling)]
    parts["scaling"] = ["-m", "benchmarks.scaling", *scaling, *device, *repeats]
    for name in parts:
        parts[name] += [] if name == "scaling" else model
    table = [f"device={arguments.device}", "experiments=table5", *TEXT]
    return parts | {"table5": [str(ROOT / "run.py"), *table, *model]}


def ran(name: str, command: list[str], file: Path) -> dict[str, Any]:
    """Run a part and return what it found. Raises UserError when it found nothing."""
    output = [] if name == "table5" else ["--json", str(file)]
    run, last = [sys.executable, *command[:2], *output, *command[2:]], ""
    with subprocess.Popen(run, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            sys.stderr.write(line)
            last = line.strip() or last  # where it fails, the reason comes last
    if name == "table5":
        if process.returncode == 0:
            return table5(command[1:])
    elif process.returncode in (0, measuring.INCOMPLETE) and file.exists():
        found = measuring.read(file)
        if name != "scaling" or "exponents" in found:  # it writes each point as it has it
            return found | {"complete": process.returncode == 0}
    raise UserError(last or f"{name} ended with status {process.returncode}")


def table5(overrides: list[str]) -> dict[str, Any]:
    """The cells of the records that the runs left: seconds and peak bytes of their stages, by method."""
    keys = {job.run.key(): job.run.method for job in config.jobs(overrides)}
    found = {}
    for one in record.load(config.home() / "records"):
        if one.id in keys:
            stages = {name: one.data["stages"][name]["cost"] for name in ("scales", "weights")}
            for name, cost in stages.items():
                if cost["machine"]["name"] != one.data["machine"]["name"]:
                    raise UserError(
                        f"the {name} of method={keys[one.id]} were made on {cost['machine']['name']}, not on "
                        f"{one.data['machine']['name']}: give a TEQ_HOME of its own"
                    )
            found[keys[one.id]] = {
                "seconds": sum(cost["seconds"] for cost in stages.values()),
                "stages": {
                    name: {key: cost[key] for key in ("seconds", "peak_bytes")}
                    for name, cost in stages.items()
                },
                "machine": one.data["machine"],
                "record": one.file.name,
            }
    missing = sorted(set(keys.values()) - found.keys())
    if missing:
        raise UserError(f"run.py left no record for method={missing[0]}")
    return found


def verdicts(model: str, cells: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What of the model's targets was reached."""
    out = {}
    for name, most in TARGETS.get(model, {}).items():
        method, _, what = name.partition(" ")
        cell = cells[method]
        value = cell["stages"]["scales"]["peak_bytes"] if what else cell["seconds"]
        out[name] = {"most": most, "measured": value, "reached": value is not None and value <= most}
    return out


def print_parts(parts: dict[str, Any]) -> None:
    """The figures that matter of each part."""
    for name, part in parts.items():
        found = part["result"]
        if name.startswith("teq_step"):
            for contender, row in found["contenders"].items():
                total = row["device_bytes"] or row["live_bytes"]
                over = ", ".join(f"{shown(r['seconds'], 0)} of {base}" for base, r in row["over"].items())
                print(f"{name}: {contender}: {row['seconds']['median']:.4f} s, {total / 1e9:.3f} GB; {over}")
        elif name == "gptq":
            for contender, ratio in found["total_over_floor"].items():
                spent = found[contender]["total"]["median"]
                print(f"gptq: {contender}: {spent:.2f} s, {ratio:.2f} of the floor")
        elif name == "scaling":
            for kind, axes in found["exponents"].items():
                print(f"scaling: {kind}: seconds over tokens {shown(axes['tokens']['seconds'], 0)}")
        else:
            for method, cell in found.items():
                print(f"table5: {method}: {cell['seconds']:.1f} s")


def main(argv: list[str]) -> int:
    """Run the parts that are missing and collect them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a model of conf/model")
    parser.add_argument("overrides", nargs="*", help="as for run.py")
    parser.add_argument("--device", default="cuda", help="cpu, cuda, cuda:<n>")
    parser.add_argument("--folder", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--neural-compressor", type=Path, metavar="PYTHON", help="python of its environment")
    parser.add_argument("--contenders", nargs="+", help="of teq_step; default: all there can be")
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048], help="of teq_step")
    parser.add_argument(
        "--scaling", nargs="+", type=int, default=[128, 256, 512, 1024, 2048], metavar="TOKENS"
    )
    parser.add_argument("--samples", type=int, default=128, help="of gptq")
    parser.add_argument("--length", type=int, default=2048, help="of gptq")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--gptq-repeats", type=int, default=1, help="a turn of a 7B takes minutes")
    arguments = parser.parse_intermixed_args(argv)
    known = config.groups()["model"]
    if arguments.model not in known:
        raise UserError(f"model={arguments.model} is not allowed: it must be one of {', '.join(known)}")
    file = arguments.folder / f"{arguments.model}.json"
    found = measuring.read(file) if file.exists() else {"model": arguments.model, "parts": {}}
    failed = {}
    for name, command in commands(arguments).items():
        before, sources = found["parts"].get(name, {}), measure.code()["sources"]
        same = before.get("command") == command and before["code"]["sources"] == sources
        if same and before["result"].get("complete", True):
            print(f"{name}: measured before")
            continue
        aside = arguments.folder / f"{arguments.model}.{name.replace(' ', '_')}.{sources}.json"
        arguments.folder.mkdir(parents=True, exist_ok=True)
        if name != "scaling":  # scaling continues from its own file, which it writes point by point
            aside.unlink(missing_ok=True)
        try:
            result = ran(name, command, aside)
            found["parts"][name] = {"command": command, "code": measure.code(), "result": result}
        except UserError as error:
            failed[name] = measuring.brief(error)
            continue
        if name == "table5":
            found["targets"] = verdicts(arguments.model, found["parts"][name]["result"])
        elif name != "scaling":  # its plot is next to its file
            aside.unlink()
        measuring.write(file, found)
    print_parts(found["parts"])
    for name, verdict in found.get("targets", {}).items():
        said = "reached" if verdict["reached"] else "missed"
        print(f"target {name} <= {verdict['most']}: {verdict['measured']}: {said}")
    for name, why in failed.items():
        print(f"failed: {name}: {why}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(measuring.command_line(main, sys.argv[1:]))
