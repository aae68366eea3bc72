"""An exported model in other projects' servers: tokens per second, resident memory, llama.cpp's perplexity.

    python -m benchmarks.serving [--turns 5] [--threads 1] [--work FOLDER] [--json FILE]

SmolLM2-135M is exported to GGUF (Q4_0, Q5_0, Q8_0) and compressed-tensors (4 bits, groups of 64, symmetric or
not). llama-cpp-python's server and `transformers serve` answer the same greedy completion, with the float
model and with each export; a row has the median of the turns, with the prompt, and the memory after them.
llama.cpp's float model is Q8_0's file with its weights dequantized to float16. Perplexities are those of the
same windows in llama.cpp and in the run; "exact" is the same file with weights dequantized to float32, for
llama.cpp rounds activations to 8 bits before it multiplies them with packed weights.

Needs `pip install 'llama-cpp-python[server]' 'transformers[serving]' compressed-tensors`.
"""

import argparse
import contextlib
import math
import statistics
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.contenders import measuring, server
from benchmarks.contenders.server import Server
from teq import config, data
from teq.export import gguf as format_gguf
from teq.export import writer
from teq.pipeline import cost
from teq.verbs import export

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "serving.json"
MODEL = "model=smollm2-135m"
RUN = [MODEL, "method=rtn", "device=cpu", "evals=[python-docs]", "ppl.limit=4", "ppl.context=256"]
HALF = ["dtype=float16", "eval_dtype=float32", "quant_grid.scale_dtype=float16"]
GGUF = {f"Q{bits}_0": [f"bits={bits}", "group_size=32", "symmetric=true", *HALF] for bits in (4, 5, 8)}
TENSORS = {
    "w4_g64_sym": ["bits=4", "group_size=64", "symmetric=true", "dtype=float32"],
    "w4_g64": ["bits=4", "group_size=64", "dtype=float32"],
}
PROMPT = "The history of the city begins with a small village near the river, where"
TOKENS = 32
LIBRARIES = ("llama-cpp-python", "transformers", "compressed-tensors", "gguf", "torch")


def exported(form: str, overrides: list[str], folder: Path) -> Path:
    """Export a run unless the folder is there. Returns it."""
    if not folder.is_dir():
        with contextlib.redirect_stdout(sys.stderr):
            export.main([*RUN, *overrides, "--format", form, "--to", str(folder)])
    return folder


def dequantized(file: Path, to: Path, dtype: str) -> Path:
    """Write a GGUF file whose matrices are those of another one in floating point. Returns its path."""
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(file)
    copy = gguf.GGUFWriter(to, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            inner = field.types[-1] if len(field.types) > 1 else None
            copy.add_key_value(key, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        copy.add_tensor(tensor.name, value.astype(np.float32 if value.ndim == 1 else dtype))
    copy.write_header_to_file()
    copy.write_kv_data_to_file()
    copy.write_tensors_to_file()
    copy.close()
    return to


def perplexity(file: Path, windows: "Tensor", threads: int) -> float:
    """Return llama.cpp's perplexity of windows of tokens."""
    import llama_cpp
    import numpy as np

    exact, context = llama_cpp.GGML_TYPE_F32, windows.shape[1]
    given = {"n_ctx": context, "n_batch": context, "n_threads": threads, "n_threads_batch": threads}
    model = llama_cpp.Llama(str(file), logits_all=True, verbose=False, type_k=exact, type_v=exact, **given)
    losses = []
    for window in windows.tolist():
        model.reset()
        model.eval(window)
        scores = np.array(model.scores[: len(window)], dtype=np.float64)
        scores -= np.logaddexp.reduce(scores, axis=1)[:, None]
        losses.append(-scores[np.arange(len(window) - 1), window[1:]].mean())
    model.close()
    return math.exp(statistics.fmean(losses))


def perplexities(files: dict[str, Path], work: Path, threads: int) -> dict[str, dict[str, float]]:
    """Return perplexities by type: of the run, of llama.cpp, and of llama.cpp on exact weights."""
    (job,) = config.jobs(RUN)
    (each,) = job.run.evals
    windows, _ = data.windows(each.corpus, job.run.model.tokenizer(), each.context, each.limit, even=True)
    found = {}
    for name, file in files.items():
        stored = measuring.read(file.parent / writer.MANIFEST)["metrics"][each.name]["values"]["ppl"]
        float32 = dequantized(file, work / f"{name}-float32.gguf", "float32")
        both = {"llama.cpp": file, "exact": float32}
        row = {key: perplexity(each, windows, threads) for key, each in both.items()}
        found[name] = {"run": stored, **row} | {f"{key} difference": row[key] / stored - 1 for key in row}
        float32.unlink()
        print(f"{name}: {found[name]}", file=sys.stderr)
    return found


def served(kind: str, model: Path, turns: int, threads: int) -> dict[str, Any]:
    """Return tokens per second and memory of one server with one model."""
    seconds, counts = [], []
    with Server(getattr(server, kind)(model, threads), threads) as running:
        text = running.complete(model, PROMPT, TOKENS)["choices"][0]["text"]  # also loads what is lazy
        for _ in range(turns):
            start = time.perf_counter()
            answer = running.complete(model, PROMPT, TOKENS)
            seconds.append(time.perf_counter() - start)
            counts.append(answer["usage"]["completion_tokens"])
        memory = running.resident()
    files = [model] if model.is_file() else list(model.glob("*.safetensors"))
    return {
        "tokens_per_second": measuring.spread([n / s for n, s in zip(counts, seconds, strict=True)]),
        "resident": memory,
        "resident_bytes": sum(memory.values()),
        "file_bytes": sum(file.stat().st_size for file in files),
        "tokens": counts[0],
        "text": text,
    }


def main(argv: list[str]) -> int:
    """Measure, print and write the JSON. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="kept: the folders are exported there once")
    parser.add_argument("--json", type=Path, default=RESULTS)
    given = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        work = (given.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))).absolute()
        files = {n: exported("gguf", o, work / n) / format_gguf.FILE for n, o in GGUF.items()}
        folders = {n: exported("compressed-tensors", o, work / n) for n, o in TENSORS.items()}
        half = dequantized(files["Q8_0"], work / "float16.gguf", "float16")
        (job,) = config.jobs([MODEL])
        contenders = {
            "llama_cpp": {"float16": half, "Q8_0": files["Q8_0"], "Q4_0": files["Q4_0"]},
            "transformers": {"float32": job.run.model.source.folder(), **folders},
        }
        found: dict[str, Any] = {"turns": given.turns, "threads": given.threads, "tokens": TOKENS}
        found["perplexity"] = perplexities(files, work, given.threads)
        found["served"] = {
            kind: {name: served(kind, model, given.turns, given.threads) for name, model in models.items()}
            for kind, models in contenders.items()
        }
    found |= {"versions": {name: metadata.version(name) for name in LIBRARIES}, "code": cost.code()}
    measuring.write(given.json, found | {"machine": cost.machine("cpu")})
    for name, row in found["perplexity"].items():
        print(f"{name}: " + ", ".join(f"{key} {value:.6g}" for key, value in row.items()))
    for kind, rows in found["served"].items():
        for name, row in rows.items():
            speed, memory = row["tokens_per_second"]["median"], row["resident_bytes"] / 1e6
            print(f"{kind} {name}: {speed:.1f} tokens/s, {memory:.0f} MB, {row['file_bytes'] / 1e6:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(measuring.command_line(main, sys.argv[1:]))
