"""`teq.load`: a quantized model in Python, from a run or from an exported folder."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from teq.evaluate import reloaded
from teq.export import formats, gguf, writer
from teq.quantizers.quantized import restore
from teq.verbs.export import found_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(run: str | Path, device: str = "cpu") -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Return a quantized model on `device`, its weights dequantized, and its tokenizer.

    `run` is an exported folder, the id of a stored run, or the overrides of run.py in one text, which run it
    where it is not stored. Raises UserError.
    """
    if (folder := Path(run)).is_dir():
        manifest = writer.read_manifest(folder)
        name = manifest["format"]
        installing = f"`pip install {shlex.join(formats.find(name).INSTALL)}`"
        formats.check_loader(name, sys.path, installing)
        file = gguf.FILE if name == gguf.NAME else None
        lm = reloaded.load(folder, file, manifest["dtype"])
        return lm.model.to(device), lm.tokenizer
    plan, weights, _ = found_run(shlex.split(str(run)))
    lm = plan.checkpoint.load(plan.dtype, device)
    restore(lm.model, weights.tensors(device), plan.grid)
    return lm.model, lm.tokenizer
