"""Time `SharedContextLM` against lm-evaluation-harness's own `HFLM` on real documents of the four tasks.

    python -m benchmarks.eval_tasks --model FOLDER --data FOLDER --output result.json

Both score the same requests with the same loaded model and batch size, one after the other, in an order that
alternates from repeat to repeat. Peak memory is that of a process that runs one of them on one task.
Processor time is recorded too, because it depends less than elapsed time on what else the machine is doing;
run with OMP_WAIT_POLICY=passive, or threads that wait for each other count as working.
"""

import argparse
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from unittest import mock

import datasets
import lm_eval.tasks
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from teq.evaluate.scoring import SharedContextLM

# Task -> folder of its definition in lm-evaluation-harness, folder and split of its documents.
TASKS = {
    "hellaswag": ("hellaswag", "hellaswag", "validation"),
    "piqa": ("piqa", "piqa", "validation"),
    "winogrande": ("winogrande", "winogrande_xl", "validation"),
    "lambada_openai": ("lambada", "lambada_openai", "test"),
}


def load_requests(task: str, data: pathlib.Path, documents: int, seed: int = 0) -> list[Instance]:
    """The harness's requests for a seeded sample of `documents` of `task`, read from Parquet below `data`."""
    definition, folder, split = TASKS[task]
    rows = datasets.Dataset.from_parquet(str(data / folder / f"{split}.parquet"))
    rows = rows.select(sorted(random.Random(seed).sample(range(len(rows)), min(documents, len(rows)))))
    definitions = pathlib.Path(lm_eval.tasks.__file__).parent / definition
    manager = lm_eval.tasks.TaskManager(include_path=str(definitions), include_defaults=False)
    # Task objects look at their training split, which zero-shot scoring does not use.
    with mock.patch("datasets.load_dataset", lambda **_: {"train": rows, split: rows}):
        loaded = manager.load(task)["tasks"][task]
    loaded.build_all_requests()
    return loaded.instances


def load_contender(name: str, args: argparse.Namespace, model: torch.nn.Module) -> HFLM:
    """The `stock` or `ours` scorer around `model`."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    if name == "ours":
        return SharedContextLM(model, tokenizer, args.batch_size)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batch_size, backend="causal")


def measure(task: str, args: argparse.Namespace, model: torch.nn.Module) -> dict:
    """Times, differences and peaks for one task."""
    requests = load_requests(task, args.data, args.documents, args.seed)
    contenders = {name: load_contender(name, args, model) for name in ("stock", "ours")}
    seconds: dict[str, list[float]] = {"stock": [], "ours": []}
    busy: dict[str, list[float]] = {"stock": [], "ours": []}
    answers: dict[str, list[tuple[float, bool]]] = {}
    for lm in contenders.values():  # the first pass of a process is slow for reasons of its own
        lm.loglikelihood(requests[: args.batch_size], disable_tqdm=True)
    for repeat in range(args.repeats):
        for name in ("stock", "ours") if repeat % 2 == 0 else ("ours", "stock"):
            start, start_busy = time.perf_counter(), time.process_time()
            answers[name] = contenders[name].loglikelihood(requests, disable_tqdm=True)
            seconds[name].append(time.perf_counter() - start)
            busy[name].append(time.process_time() - start_busy)
    pairs = list(zip(answers["stock"], answers["ours"], strict=True))
    peaks = {name: peak_of(name, task, args) for name in contenders}
    return {
        "task": task,
        "documents": len({request.doc_id for request in requests}),
        "requests": len(requests),
        "stock_s": seconds["stock"],
        "ours_s": seconds["ours"],
        "stock_processor_s": busy["stock"],
        "ours_processor_s": busy["ours"],
        "ratios": ratios(seconds),
        "processor_ratios": ratios(busy),
        "max_loglikelihood_difference": max(abs(stock[0] - ours[0]) for stock, ours in pairs),
        "greedy_equal": all(stock[1] == ours[1] for stock, ours in pairs),
        "peak_bytes": peaks,
        "peak_ratio": peaks["ours"] / peaks["stock"],
    }


def ratios(seconds: dict[str, list[float]]) -> list[float]:
    """Stock's time over ours, repeat by repeat."""
    return [stock / ours for stock, ours in zip(seconds["stock"], seconds["ours"], strict=True)]


def peak_of(name: str, task: str, args: argparse.Namespace) -> int:
    """Peak resident bytes of a process of its own that loads the model and scores `task` once with `name`."""
    options = [f"--{key.replace('_', '-')}={value}" for key, value in vars(args).items() if value is not None]
    command = [
        sys.executable,
        "-m",
        "benchmarks.eval_tasks",
        *options,
        f"--tasks={task}",
        f"--peak-of={name}",
    ]
    root = pathlib.Path(__file__).resolve().parent.parent
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=root)
    return int(result.stdout.split()[-1])


def print_peak(args: argparse.Namespace, model: torch.nn.Module) -> None:
    """The child's side of `peak_of`."""
    requests = load_requests(args.tasks, args.data, args.documents, args.seed)
    load_contender(args.peak_of, args, model).loglikelihood(requests, disable_tqdm=True)
    status = pathlib.Path("/proc/self/status").read_text()
    print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024)


def print_table(rows: list[dict]) -> None:
    """One line per task."""
    print(
        f"{'task':16}{'docs':>6}{'stock s':>9}{'ours s':>9}{'ratio':>8}{'min':>7}{'max':>7}"
        f"{'cpu':>7}{'max |d|':>10}{'greedy':>8}{'peak':>7}"
    )
    for row in rows:
        found, busy = row["ratios"], row["processor_ratios"]
        print(
            f"{row['task']:16}{row['documents']:6}{statistics.median(row['stock_s']):9.2f}"
            f"{statistics.median(row['ours_s']):9.2f}{statistics.median(found):8.2f}{min(found):7.2f}"
            f"{max(found):7.2f}{statistics.median(busy):7.2f}{row['max_loglikelihood_difference']:10.1e}"
            f"{'same' if row['greedy_equal'] else 'DIFFER':>8}{row['peak_ratio']:7.2f}"
        )


def absolute(text: str) -> pathlib.Path:
    """A path that means the same in a child process elsewhere."""
    return pathlib.Path(text).resolve()


def processor() -> str:
    """The processor's name, where the system tells."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=absolute, required=True, help="folder of a causal model")
    parser.add_argument("--data", type=absolute, required=True, help="folder of <set>/<split>.parquet")
    parser.add_argument("--documents", type=int, default=25, help="documents per task")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the sample of documents")
    parser.add_argument("--tasks", default=",".join(TASKS), help="names separated by commas")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file to write")
    parser.add_argument("--peak-of", choices=("stock", "ours"), help=argparse.SUPPRESS)
    args = parser.parse_args()

    logging.disable(logging.WARNING)  # the harness's remarks on each model and task
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    if args.peak_of:
        print_peak(args, model)
        return
    rows = []
    for task in args.tasks.split(","):
        rows.append(measure(task, args, model))
        print(f"{task}: ratios {[round(ratio, 2) for ratio in rows[-1]['ratios']]}", file=sys.stderr)
    print_table(rows)
    if args.output:
        packages = ("torch", "transformers", "lm_eval", "tokenizers")
        report = {
            "machine": {"processor": processor(), "cores": os.cpu_count(), "platform": platform.platform()},
            "versions": {
                "python": platform.python_version(),
                **{package: importlib.metadata.version(package) for package in packages},
            },
            "model": args.model.name,
            "batch_size": args.batch_size,
            "threads": args.threads,
            "seed": args.seed,
            "tasks": rows,
        }
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
