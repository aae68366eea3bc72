"""A folder that other code loads: shards, configuration, tokenizer, manifest and model card.

It is written aside and renamed. `teq.json` holds the digest of every tensor as it was stored, and the numbers
of the record: what `python -m teq verify` compares with.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from teq.export import awq, card, formats, gguf
from teq.export.plan import Part, Plan
from teq.files import disk
from teq.files.digests import tensor_digest
from teq.grid import pack
from teq.models import Folder
from teq.pipeline import cost
from teq.pipeline.store import DATA, Artefact
from teq.quantizers.quantized import Quantized
from teq.record import Record
from teq.spec import UserError

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "teq.json"
INDEX = "model.safetensors.index.json"
PARTS = {"format", "run", "dtype", "metrics", "linears", "tensors"}  # of a manifest, that readers need


def check_free(folder: Path) -> None:
    """Raise UserError where the folder exists."""
    if os.path.lexists(folder):
        raise UserError(f"--to {folder} exists: name a folder that does not, or move it away")


def write(
    plan: Plan, weights: Artefact, record: Record, name: str, folder: Path, command: str
) -> dict[str, Any]:
    """Export to a new folder in the format `name`, block by block. Returns its manifest.

    Raises UserError where the format cannot hold the model or the folder cannot be written.
    """
    formats.check(name, plan)
    check_free(folder)
    form, making = formats.find(name), disk.making_beside(folder)
    try:
        disk.remove_leftovers(folder)
        making.mkdir(parents=True)
        plan.checkpoint.tokenizer().save_pretrained(making)
        plan.checkpoint.source.generation().save_pretrained(making)
        _write_configuration(plan, form, making)
        parts = plan.parts(weights.folder / DATA)
        written = gguf.write(plan, parts, making) if form is gguf else _shards(plan, form, parts, making)
        manifest = _manifest(plan, record, name, command) | _digests(plan, written)
        (making / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        (making / "README.md").write_text(card.render(manifest))
        for file in making.iterdir():
            disk.open_to_all(file)
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        check_free(folder)
        making.rename(folder)
    except OSError as error:
        why = error.strerror or f"is the disk full? {error}"  # numpy's errors have no number
        raise UserError(f"--to {folder} cannot be written ({why}): choose another folder") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of an exported folder. Raises UserError where there is none, or another file."""
    try:
        found = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} has no readable {MANIFEST}: give a folder that `export` wrote") from error
    if not isinstance(found, dict) or not found.keys() >= PARTS:
        raise UserError(f"{folder / MANIFEST} is not as `export` wrote it: export the run again")
    return found


def _write_configuration(plan: Plan, form: ModuleType, folder: Path) -> None:
    """Write config.json, as `save_pretrained` does, with what tells loaders of the quantization."""
    content = json.loads(plan.checkpoint.source.dimensions().to_json_string())
    content["architectures"] = [type(plan.outline).__name__]
    content["dtype"] = form.dtype(plan.dtype)
    if form is not gguf:
        content["quantization_config"] = form.configuration(plan)
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")


def _shards(plan: Plan, form: ModuleType, parts: Iterator[Part], folder: Path) -> Iterator[Part]:
    """Write one shard for each part, and the index; yield each part once it is written."""
    import torch

    shards, where, total = len(plan.names), {}, 0
    grid = form.stored(plan)
    kept = getattr(torch, form.dtype(plan.dtype))
    for i, part in enumerate(parts, 1):
        every = part.others | (awq.activation_scales(plan, part) if form is awq else {})
        others = {name: t.to(kept) if t.is_floating_point() else t for name, t in every.items()}
        for name, tensor in others.items():
            # isfinite of whole embeddings would take four times their size
            if tensor.is_floating_point() and not all(end.isfinite() for end in tensor.aminmax()):
                raise UserError(f"{name} has values that {form.dtype(plan.dtype)} does not hold")
        packed = {
            f"{name}.{suffix}": tensor
            for name, linear in part.linears.items()
            for suffix, tensor in form.packed(linear, grid).items()
        }
        file = f"model-{i:05}-of-{shards:05}.safetensors"
        disk.save_tensors(folder / file, {**others, **packed}, {"format": "pt"})
        where |= dict.fromkeys([*others, *packed], file)
        total += sum(tensor.nbytes for tensor in (*others.values(), *packed.values()))
        yield Part(part.linears, others)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _manifest(plan: Plan, record: Record, name: str, command: str) -> dict[str, Any]:
    """Return what the folder is: run, format, numbers, and what it was made with."""
    data, form = record.data, formats.find(name)
    stored = form.stored(plan)
    numbers = {
        each: {"values": metric["values"], "interval": card.interval(record, each), "info": metric["info"]}
        for each, metric in record.metrics.items()
    }
    return {
        "format": name,
        "loader": list(form.INSTALL),
        "id": record.id,
        "run": data["run"],
        "identity": data["identity"],
        "text": data["text"],
        "dtype": form.dtype(plan.dtype),
        "scale_dtype": stored.scale_dtype,
        "bits_per_weight": stored.bits_per_weight(plan.shapes.values()),
        "metrics": numbers,
        "code": data["code"],
        "exported_by": {"code": cost.code(), "versions": cost.versions()},
        "command": command,
    }


def _digests(plan: Plan, parts: Iterator[Part]) -> dict[str, Any]:
    """Return the digests of all tensors; writes them, part by part."""
    linears, others = {}, {}
    for part in parts:
        linears |= {name: digests(linear, plan.grid.bits) for name, linear in part.linears.items()}
        others |= {name: tensor_digest(tensor) for name, tensor in part.others.items()}
    return {"linears": linears, "tensors": others}


def digests(linear: Quantized, bits: int) -> dict[str, str]:
    """Return the digests of a linear's codes, scale and zero, as they are stored, and of g_idx."""
    import torch

    found = {
        "codes": tensor_digest(pack(linear.codes, bits)),
        "scale": tensor_digest(linear.scale.float()),
        "zero": tensor_digest(linear.zero.to(torch.uint8)),
    }
    return found if linear.g_idx is None else found | {"g_idx": tensor_digest(linear.g_idx.to(torch.int32))}


@dataclass(frozen=True, kw_only=True)
class Exported(Folder):
    """An exported folder, whatever the format of its weights."""

    def folder(self) -> Path:
        """Return the folder."""
        return self.folder_path()


def read(plan: Plan, name: str, folder: Path) -> Iterator[tuple[str, Quantized]]:
    """Yield the quantized linears by name that a folder holds."""
    from safetensors import safe_open

    form = formats.find(name)
    if form is gguf:
        yield from gguf.read(plan, folder)
        return
    with contextlib.ExitStack() as stack:
        files: dict[str, Mapping[str, Tensor]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            opened = stack.enter_context(safe_open(path, "pt"))
            files |= dict.fromkeys(opened.keys(), opened)
        for linear in plan.shapes:
            inside = {key: files[key] for key in files if key.rpartition(".")[0] == linear}
            tensors = {key.rpartition(".")[2]: file.get_tensor(key) for key, file in inside.items()}
            yield linear, form.unpacked(tensors, plan.grid)
