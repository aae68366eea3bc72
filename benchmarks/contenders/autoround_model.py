"""Quantize a saved model with auto-round's own code, in an environment that has it, without this project.

    python3 -m venv AR
    AR/bin/pip install torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 numpy==2.4.6
    AR/bin/pip install safetensors requests tqdm py-cpuinfo pydantic
    AR/bin/pip install --no-deps auto-round==0.16.1
    AR/bin/python benchmarks/contenders/autoround_model.py FOLDER

FOLDER holds the model and its tokenizer as `save_pretrained` writes them, the calibration windows in
`tokens.safetensors` (`tokens [window, token]`) and `job.json` (see `main`). What comes of it lies there too:
`weights.safetensors`, the dequantized weights of the quantized linears by name, and `found.json`.
"""

import gc
import json
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from auto_round import AutoRound
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

SCALES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
LIBRARIES = ("auto-round", "torch", "transformers")


class Collecting:
    """Counts the seconds of Python's garbage collector, which auto-round calls after every block."""

    def __init__(self) -> None:
        self.seconds = self.begun = 0.0
        gc.callbacks.append(self)

    def __call__(self, phase: str, _: object) -> None:
        """Note the beginning or the end of a collection."""
        now = time.perf_counter()
        if phase == "start":
            self.begun = now
        else:
            self.seconds += now - self.begun


def main(folder: Path) -> None:
    """Quantize as the job says: its `grid`, `iterations`, windows a step (`batch`), `compile`, `threads`."""
    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokens = load_file(folder / "tokens.safetensors")["tokens"]
    grid, collecting, begun = job["grid"], Collecting(), time.perf_counter()
    quantizer = AutoRound(
        model,
        tokenizer,
        bits=grid["bits"],
        group_size=grid["group_size"],
        sym=grid["symmetric"],
        scale_dtype=SCALES[grid.get("scale_dtype", "float32")],
        iters=job["iterations"],
        batch_size=job["batch"],
        dataset=list(tokens.split(job["batch"])),
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        amp=False,  # true makes the model bfloat16 on a CPU
        enable_torch_compile=job["compile"],
        device_map="cpu",
        low_cpu_mem_usage=False,
    )
    model, _ = quantizer.quantize()
    found = {"seconds": time.perf_counter() - begun, "collecting_seconds": collecting.seconds}
    found["peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found["versions"] = {name: version(name) for name in LIBRARIES}
    quantized = {name: module for name, module in model.named_modules() if hasattr(module, "zp")}
    weights = {f"{name}.weight": linear.weight.detach().contiguous() for name, linear in quantized.items()}
    save_file(weights, folder / "weights.safetensors")
    (folder / "found.json").write_text(json.dumps(found))  # last: the weights are whole where it is there


if __name__ == "__main__":
    main(Path(sys.argv[1]))
