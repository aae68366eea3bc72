"""Seconds and peak memory of a TEQ step and of GPTQ per block, as the model and as the tokens grow.

    python -m benchmarks.scaling [--models tiny-llama ...] [--tokens 128 ...] [--device cpu] [--json FILE]

Weights are synthetic. Models are compared at the least number of tokens, tokens on the model --grow. Every
point is measured in its own process, after a warm-up, and written at once; what the JSON holds already is not
measured again. GPTQ is that of the first two blocks on --samples sequences. Memory is the peak of live
tensors over the weights. Exponents are slopes of least squares through the logarithms: of all points, and of
the last two alone, because small ones are mostly overhead. Each measured peak is printed with the one that
`python -m teq plan` predicts. The plot is written next to the JSON.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contenders import measuring
from benchmarks.contenders.measuring import ratio, shown
from benchmarks.contenders.worker import Spec, Worker, training
from teq import config
from teq.device.runtime import resolve
from teq.spec import UserError

MODELS = ("tiny-llama", "smollm2-135m", "bloom-560m", "opt-1.3b")
TOKENS = (128, 256, 512, 1024, 2048)
KINDS = {"teq": "TEQ, a step", "gptq": "GPTQ, a block"}
SIZE = {"teq": "parameters", "gptq": "block_weights"}  # what a kind's cost grows with
FIGURES = {"seconds": "seconds", "live_bytes": "live bytes over the weights"}

Point = dict[str, Any]
Line = list[tuple[float, Point]]  # what grew, and the point
Lines = dict[tuple[str, str], Line]  # by kind and by what grew: `model` or `tokens`


def specified(kind: str, model: str, tokens: int, samples: int, dtype: str, device: str) -> Spec:
    """The contender of one point."""
    given = [f"model={model}", "model.weights=synthetic", f"method={kind}", f"dtype={dtype}"]
    given += ["evals=[python-docs]", f"gptq.samples={samples}", f"gptq.length={tokens}"]
    (job,) = config.jobs(given)
    if kind == "gptq":
        return Spec("gptq", job.run.model, job.run.quantizer, tokens, samples, dtype, device)
    return Spec("ours", job.run.model, training(job.run), tokens, 1, dtype, device)


def measured(spec: Spec, repeats: int) -> tuple[Point, dict[str, Any]]:
    """One point, and the machine it was measured on."""
    with Worker(spec) as worker:
        worker.step()
        seconds = [worker.step()[0] for _ in range(repeats)]
        memory = worker.memory()
    blocks = worker.hello["blocks"] if spec.name == "gptq" else 1
    point = {"seconds": measuring.spread([value / blocks for value in seconds])}
    point |= {key: worker.hello[key] for key in ("parameters", "block_weights")}
    # resident memory after so many steps tells little
    kept = ("live_bytes", "device_bytes", "predicted_bytes")
    return point | {key: memory[key] for key in kept}, worker.hello["machine"]


def slope(x: list[float], y: list[float]) -> float | None:
    """The exponent p of the y = c x^p that fits best in the logarithms; None of less than two points."""
    if len(set(x)) < 2 or min(y) <= 0:
        return None
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def series(
    points: list[Point], kind: str, axis: str, models: list[str], tokens: list[int], grow: str
) -> Line:
    """The points of one kind along one axis, least first."""
    if axis == "model":
        chosen = [p for p in points if p["tokens"] == tokens[0] and p["model"] in models]
        found = [(p[SIZE[kind]], p) for p in chosen if p["kind"] == kind]
    else:
        chosen = [p for p in points if p["model"] == grow and p["tokens"] in tokens]
        found = [(p["tokens"], p) for p in chosen if p["kind"] == kind]
    return sorted(found, key=lambda pair: pair[0])


def value(point: Point, figure: str) -> float:
    """What is plotted of a point."""
    return point["seconds"]["median"] if figure == "seconds" else point[figure]


def exponents(lines: Lines) -> dict[str, dict[str, dict[str, float | None]]]:
    """By kind and axis, of seconds and bytes: over all points, and over the last two."""
    out: dict[str, dict[str, dict[str, float | None]]] = {}
    for (kind, axis), line in lines.items():
        x = [float(x) for x, _ in line]
        found = out.setdefault(kind, {}).setdefault(axis, {})
        for figure in FIGURES:
            y = [value(point, figure) for _, point in line]
            found[figure], found[f"{figure}_last"] = slope(x, y), slope(x[-2:], y[-2:])
    return out


def draw(lines: Lines, found: dict[str, Any], file: Path) -> None:
    """The four panels as SVG, byte for byte the same for the same points."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {"svg.hashsalt": "scaling", "svg.fonttype": "none", "font.family": "DejaVu Sans", "font.size": 9}
    labels = {"model": "parameters (of the model; of a block for GPTQ)", "tokens": "tokens"}
    with matplotlib.rc_context(style):
        canvas = Figure(figsize=(9, 6.4), layout="constrained")
        for axes, (figure, axis) in zip(
            canvas.subplots(2, 2).ravel(), [(f, a) for f in FIGURES for a in labels], strict=True
        ):
            for kind, title in KINDS.items():
                line = lines[kind, axis]
                exponent = found[kind][axis][figure]
                said = title if exponent is None else f"{title}: {exponent:.2f}"
                x, y = [x for x, _ in line], [value(point, figure) for _, point in line]
                axes.plot(x, y, marker="o", markersize=4, label=said)
            axes.set(xscale="log", yscale="log", xlabel=labels[axis], ylabel=FIGURES[figure])
            axes.legend()
        canvas.savefig(file, format="svg", metadata={"Date": None, "Creator": None})


def print_table(lines: Lines, found: dict[str, Any]) -> None:
    """A line for each point of each series, and its exponents."""
    for (kind, axis), line in lines.items():
        print(f"{KINDS[kind]}, as the {axis} grows" if axis == "model" else f"{KINDS[kind]}, as tokens grow")
        for x, point in line:
            spent = "".join(shown(point["seconds"][key], 10, 4) for key in ("median", "min", "max"))
            name = point["model"] if axis == "model" else ""
            live, foreseen = point["live_bytes"], ratio(point["predicted_bytes"], point["live_bytes"])
            print(f"  {name:<16}{x:>14}{spent} s{shown(live / 1e6, 12, 1)} MB", end="")
            print(f", predicted over it {shown(foreseen, 0)}")
        for figure, title in FIGURES.items():
            every, last = found[kind][axis][figure], found[kind][axis][f"{figure}_last"]
            print(f"  exponent of {title}: {shown(every, 0)}, over the last two {shown(last, 0)}")


def kept(file: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    """What was measured before. Raises UserError where it was measured otherwise."""
    if file is None or not file.exists():
        return {"settings": settings, "points": {}}
    found = measuring.read(file)
    if found.get("settings") != settings:
        raise UserError(
            f"{file} was measured with {found.get('settings')}, not {settings}: give another --json"
        )
    return found


def main(argv: list[str]) -> int:
    """Measure what is missing, print, write, plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--grow", help="the model on which tokens grow; default: the second, or the only one")
    parser.add_argument("--samples", type=int, default=8, help="sequences that GPTQ is calibrated on")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda, cuda:<n>")
    parser.add_argument("--dtype", help="of the weights; default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    # to ask torch whether `cpu` exists would mean to import it
    device = "cpu" if arguments.device == "cpu" else resolve(arguments.device)
    dtype = arguments.dtype or measuring.default_dtype(device)
    models, tokens = arguments.models, sorted(arguments.tokens)
    grow = arguments.grow or models[min(1, len(models) - 1)]
    settings = {"device": device, "dtype": dtype}
    settings |= {"samples": arguments.samples, "repeats": arguments.repeats}
    found = kept(arguments.json, settings)
    wanted = dict.fromkeys([(model, tokens[0]) for model in models] + [(grow, count) for count in tokens])
    specs = {
        f"{kind} {model} {count}": specified(kind, model, count, arguments.samples, dtype, device)
        for model, count in wanted
        for kind in KINDS
    }
    failed = {}
    for key in [key for key in specs if key not in found["points"]]:
        try:
            point, machine = measured(specs[key], arguments.repeats)
        except UserError as error:
            failed[key] = measuring.brief(error)
            continue
        if found.setdefault("machine", machine) != machine:
            raise UserError(f"{arguments.json} was measured on another machine: give another --json")
        kind, model, count = key.split()
        found["points"][key] = {"kind": kind, "model": model, "tokens": int(count), **point}
        if arguments.json:
            measuring.write(arguments.json, found)
    points = list(found["points"].values())
    lines = {
        (kind, axis): series(points, kind, axis, models, tokens, grow)
        for kind in KINDS
        for axis in ("model", "tokens")
    }
    found["exponents"] = exponents(lines)
    print_table(lines, found["exponents"])
    for key, why in failed.items():
        print(f"failed: {key}: {why}")
    if arguments.json:
        measuring.write(arguments.json, found)
        draw(lines, found["exponents"], arguments.json.with_suffix(".svg"))
    return measuring.INCOMPLETE if failed else 0


if __name__ == "__main__":
    sys.exit(measuring.command_line(main, sys.argv[1:]))
