"""A model folder loaded by stock code and measured: `python -m teq.evaluate.reloaded <folder> <request>`.

It runs in a process, and perhaps an environment, of its own. The request is a JSON file: `evaluations` as
records hold them, `linears` by name, and `file` (null unless it is GGUF) with its `dtype`; the answer is the
last line of standard output.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teq.device.runtime import Runtime
from teq.evaluate.lastword import LastWord
from teq.evaluate.perplexity import Perplexity
from teq.evaluate.tasks import Task
from teq.files.digests import tensor_digest
from teq.models.checkpoint import LM
from teq.stage import Metric

if TYPE_CHECKING:
    from torch import Tensor, nn

KINDS = {kind.__name__: kind for kind in (LastWord, Perplexity, Task)}
LOADERS = ("torch", "transformers", "compressed-tensors", "gptqmodel", "optimum", "gguf")


def main(argv: Sequence[str]) -> int:
    """Print the answer to a request. Returns the exit status."""
    print(json.dumps(answer(Path(argv[0]), json.loads(Path(argv[1]).read_text()))))
    return 0


def answer(folder: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """Return what stock code finds in a folder."""
    import torch

    lm = load(folder, request["file"], request["dtype"])
    with torch.inference_mode():
        lm.model(torch.zeros(1, 1, dtype=torch.int64))  # compressed-tensors dequantizes at the first pass
    state = {name: tensor_digest(tensor) for name, tensor in lm.model.state_dict().items()}
    weights = {}
    for name in request["linears"]:
        weight = weight_of(lm.model.get_submodule(name))
        weights[name] = {"digest": tensor_digest(weight), "dtype": str(weight.dtype).removeprefix("torch.")}
    return {
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "linear": type(lm.model.get_submodule(request["linears"][0])).__name__,
        "versions": {name: metadata.version(name) for name in LOADERS if _installed(name)},
        "weights": weights,
        "tensors": state,
        "metrics": dict(measured(lm, plain) for plain in request["evaluations"]),
    }


def load(folder: Path, file: str | None, dtype: str) -> LM:
    """Return the model as transformers loads it untold, and its tokenizer; a GGUF file names no `dtype`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(folder, **given)
    if file is not None:
        given |= {"gguf_file": file, "dtype": getattr(torch, dtype)}
    model = AutoModelForCausalLM.from_pretrained(folder, **given)
    return LM(model.eval().requires_grad_(False), tokenizer, None, "reloaded")


def weight_of(module: "nn.Module") -> "Tensor":
    """Return the weight `[out, in]` that a loaded linear multiplies with, dequantized by its own code."""
    if hasattr(module, "dequantize_weight"):  # GPTQModel's: [in, out]
        return module.dequantize_weight().T
    return module.weight


def measured(lm: LM, plain: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name of an evaluation that a record describes, and its numbers."""
    fields = {name: value for name, value in plain.items() if name not in ("kind", "version")}
    evaluation = KINDS[plain["kind"]](**fields)
    metric: Metric = evaluation.measure(lm, Runtime())
    return evaluation.name, {"values": metric.values, "info": metric.info}


def _installed(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
