"""Records: one immutable JSON file per run, with everything that a table, a figure or a bootstrap needs."""

import base64
import json
import logging
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from teq.files import disk
from teq.spec import UserError, digest

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)
SCHEMA = 1
DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
OUTPUT_ERROR, WEIGHT_ERROR = "output_error", "weight_error"  # of each linear, relative
LARGEST = 2**28  # bytes of one unpacked array: a record is no place for more


@dataclass(frozen=True)
class Record:
    """What a run was, what it measured and what it took. `data` is the JSON object as stored."""

    data: dict[str, Any]
    file: Path

    @property
    def id(self) -> str:
        """Return the run's content hash, computable from the configuration alone."""
        return str(self.data["id"])

    @property
    def metrics(self) -> dict[str, Any]:
        """Return by evaluation: `values`, packed `arrays`, `info`."""
        return self.data["metrics"]

    @property
    def weights(self) -> dict[str, Any]:
        """Return `bits_per_weight`, which records from before it lack; unquantized, of the dtype."""
        run, known = self.data["run"], self.data["quantization"].get("bits_per_weight")
        if known is None and not run["quantizer"].get("grid"):
            known = 8 * DTYPE_BYTES[run["dtype"]]
        return {} if known is None else {"bits_per_weight": known}

    @property
    def synthetic(self) -> bool:
        """Return whether the weights were made up: such a record tells time and memory, never quality."""
        return self.data["run"]["model"]["source"]["kind"] == "Synthetic"

    def array(self, evaluation: str, name: str) -> np.ndarray:
        """Return a packed array of an evaluation, such as `window_loss` or `correct`."""
        return unpack(self.metrics[evaluation]["arrays"][name])


def pack(array: np.ndarray) -> dict[str, Any]:
    """Return an array as JSON: dtype, shape, and its little-endian bytes, compressed, in base 64."""
    little = array.astype(array.dtype.newbyteorder("<"))
    data = base64.b64encode(zlib.compress(little.tobytes(), 9)).decode()
    return {"dtype": little.dtype.str, "shape": list(array.shape), "data": data}


def unpack(packed: dict[str, Any]) -> np.ndarray:
    """Return the inverse of `pack`. Raises ValueError where the data are not of the shape that is given."""
    dtype, shape = np.dtype(packed["dtype"]), packed["shape"]
    size = dtype.itemsize * math.prod(shape)
    if dtype.hasobject or not 0 <= size <= LARGEST:
        raise ValueError(f"an array of {dtype} {shape} is not allowed: {LARGEST} bytes at most")
    reader = zlib.decompressobj()
    raw = reader.decompress(base64.b64decode(packed["data"]), size + 1)
    if len(raw) != size:
        raise ValueError(f"an array of {dtype} {shape} has other data than that")
    return np.frombuffer(raw, dtype=dtype).reshape(shape)


def write(data: dict[str, Any], folder: Path) -> Record:
    """Store a record under its id and the digest of its stages' results; the same one is written once.

    One that was damaged is written anew. Says so where an earlier record of the run has other results. Raises
    UserError where the folder cannot be written, OSError where what is there cannot be read.
    """
    trail = digest({name: [stage["key"], stage["digest"]] for name, stage in data["stages"].items()})[:8]
    file = folder / f"{data['id']}-{trail}.json"
    if (kept := read(file)) is not None:
        return kept
    if file.is_file():
        file.read_bytes()  # a failing disk is no damage: what is there may be good
    keys = {name: stage["key"] for name, stage in data["stages"].items()}
    if (earlier := find(folder, data["id"], keys, {})) is not None:
        log.warning("%s: computed again, with other results than in %s", data["id"], earlier.file.name)
    text = json.dumps({"schema": SCHEMA, **data}, allow_nan=False, separators=(",", ":"))
    try:
        disk.write_text(file, text)
    except OSError as error:
        raise UserError(
            f"the record {file} cannot be written ({error.strerror}): free space there, or set TEQ_HOME to a "
            "folder you own; what was computed is kept"
        ) from error
    return Record(json.loads(file.read_text()), file)


def find(folder: Path, run: str, keys: Mapping[str, str], results: Mapping[str, str | None]) -> Record | None:
    """Return the latest record of a run with these stage keys and, where given, result digests, or None."""
    found = []
    for file in sorted(folder.glob(f"{run}-*.json")):
        if (one := read(file)) is None:
            continue
        stages = one.data["stages"]
        same = {name: stage["key"] for name, stage in stages.items()} == dict(keys)
        wanted = {name: result for name, result in results.items() if result is not None}
        if same and all(stages[name].get("digest") == result for name, result in wanted.items()):
            found.append(one)
    return max(found, key=lambda one: one.data["created"], default=None)


def read(file: Path) -> Record | None:
    """Return the record in `file`; None, with a warning, if it is damaged or of another schema."""
    try:
        data = json.loads(file.read_text())
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema {data['schema']}, this version reads {SCHEMA}")
        _check(data)
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever a damaged file may lead to: it must not hide the others
        reason = f"no {error} in it" if isinstance(error, KeyError) else error
        log.warning("record %s is left out: %s", file, reason)
        return None
    return Record(data, file)


def load(*folders: Path) -> list[Record]:
    """Return every readable record, oldest first within a folder, folders in the order given.

    A record that is broken or of another schema is named in a warning and left out; it never hides the
    others.
    """
    found = []
    for folder in folders:
        inside = [read(file) for file in sorted(folder.glob("*.json"))] if folder.is_dir() else []
        found += sorted((one for one in inside if one is not None), key=lambda one: one.data["created"])
    return found


def _check(data: dict[str, Any]) -> None:
    """Raise an error where a record lacks what its readers rely on: they read it without a further check."""
    run, metrics = data["run"], data["metrics"]
    data["id"], data["identity"], "" + data["created"]
    for site in data["training"]["scales"].values():
        float(site["near"]), int(site["channels"])
        for name in ("s", "moved"):
            float(site[name]["lowest"]), float(site[name]["highest"]), sum(site[name]["counts"])
    for text in data["text"].values():
        _check_text(text or {})
    run["model"]["name"], run["model"]["source"]["kind"], run["method"], run["quantizer"]["kind"]
    run["transform"]["kind"], (run["quantizer"].get("grid") or {}).get("bits")
    for kind in (OUTPUT_ERROR, WEIGHT_ERROR):  # which older records lack
        for error in data["quantization"].get(kind, {}).values():
            float(error)
    for stage in data["stages"].values():
        float(stage["cost"]["seconds"]), stage["cost"]["peak_bytes"]
    for metric in metrics.values():
        _check_text(metric["info"])
        for value in metric["values"].values():
            float(value)
        for packed in metric["arrays"].values():
            unpack(packed)
    if len(metrics) != len(run["evals"]):
        raise ValueError(f"{len(metrics)} metrics of {len(run['evals'])} evaluations")


def _check_text(info: dict[str, Any]) -> None:
    if info.get("partial"):
        int(info["rows"]), int(info["expected_rows"])


def frame(records: Iterable[Record]) -> "pd.DataFrame":
    """Return one row per record: settings by dotted name, `<evaluation>.<metric>`, `seconds.<stage>`."""
    import pandas as pd

    return pd.DataFrame([_row(record) for record in records])


def _row(record: Record) -> dict[str, Any]:
    run, row = record.data["run"], {"id": record.id, "model": record.data["run"]["model"]["name"]}
    row |= {"method": run["method"], "dtype": run["dtype"], **dict(_flat(run["transform"], "transform"))}
    row |= dict(_flat(run["quantizer"], "quantizer")) | dict(_flat(run.get("finetune", {}), "finetune"))
    grid = run["quantizer"].get("grid") or {}
    row |= {key: grid.get(key) for key in ("bits", "group_size", "symmetric")} | record.weights
    for name, metric in record.metrics.items():
        row |= {f"{name}.{key}": value for key, value in metric["values"].items()}
    for stage, entry in record.data["stages"].items():
        row[f"seconds.{stage}"] = entry["cost"]["seconds"]
        row[f"peak_bytes.{stage}"] = entry["cost"]["peak_bytes"]
    return row | {"created": record.data["created"], "file": record.file.name}


def _flat(settings: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}", value
