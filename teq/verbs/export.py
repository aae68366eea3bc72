"""`python -m teq export <run id or overrides>`: a quantized model as a folder that other code loads."""

import argparse
import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from teq import config, record
from teq.config import Job
from teq.device import locks
from teq.device.runtime import Runtime, resolve
from teq.export import formats, writer
from teq.export.plan import Plan
from teq.grid import Grid
from teq.models import Arch, Checkpoint, Hub, Random, Synthetic, Wheel
from teq.pipeline import run as pipeline
from teq.pipeline.loaded import LoadedModel
from teq.pipeline.settings import Run
from teq.pipeline.stages import Chain, final_weights
from teq.pipeline.store import Artefact, Store
from teq.record import Record
from teq.spec import UserError
from teq.verbs.run import checked_jobs

SOURCES = {source.__name__: source for source in (Hub, Random, Synthetic, Wheel)}


def main(argv: list[str]) -> int:
    """Export one run. Returns the exit status; raises UserError."""
    parser = argparse.ArgumentParser(
        prog="python -m teq export",
        description="Write a quantized model as a folder that other code loads.",
        epilog="`python -m teq verify <folder>` loads it and compares it with the run's numbers.",
    )
    parser.add_argument("run", nargs="+", metavar="RUN", help="the id of a run, or run.py's overrides")
    parser.add_argument("--format", default=formats.DEFAULT, help=f"one of {', '.join(formats.FORMATS)}")
    parser.add_argument(
        "--to", required=True, type=Path, metavar="FOLDER", help="a folder that does not exist"
    )
    try:
        given = parser.parse_args(argv)
    except SystemExit as stopped:
        return int(stopped.code or 0)
    folder = given.to.expanduser().absolute()
    formats.find(given.format)
    writer.check_free(folder)
    found = found_run(given.run, given.format)
    command = f"python -m teq export {shlex.join(argv)}"
    manifest = writer.write(*found, given.format, folder, command)
    print(f"{given.format}: {manifest['bits_per_weight']} bits per quantized weight, in {folder}")
    print(f"verify it: python -m teq verify {shlex.quote(str(given.to))}")
    return 0


def found_run(words: list[str], form: str | None = None) -> tuple[Plan, Artefact, Record]:
    """Return what the command line names: a stored run by its id, or one by overrides, run where it is not.

    Raises UserError where the format, if one is given, cannot hold it, before any heavy work.
    """
    if len(words) == 1 and "=" not in words[0]:
        return _stored(words[0], form)
    jobs = checked_jobs(words)
    if len(jobs) > 1:
        raise UserError(f"these overrides name {len(jobs)} runs: export one after the other")
    return _run(jobs[0], form)


def _stored(run: str, form: str | None) -> tuple[Plan, Artefact, Record]:
    """Return the run with this id out of the records and the cache."""
    every = record.load(config.home() / "records")
    found = max((one for one in every if one.id == run), key=lambda one: one.data["created"], default=None)
    if found is None:
        raise UserError(
            f"there is no record of a run {run!r} in {config.home() / 'records'}: give an id from there, or "
            "run.py's overrides, which run it"
        )
    plan = plan_of(found.data["run"], checkpoint_of(found.data["run"], found.data["identity"]))
    if form is not None:
        formats.check(form, plan)
    if (now := plan.checkpoint.source.fingerprint()) != found.data["identity"]:
        raise UserError(
            f"run {run} had the weights {found.data['identity']}, they are {now} now: run it again"
        )
    name = final_weights(found.data["stages"])
    stage = found.data["stages"][name]
    artefact = Store(config.home() / "store").find(name, stage["key"])
    if artefact is None or artefact.digest != stage["digest"]:
        raise UserError(
            f"the weights of run {run} are not in the cache any more: "
            "`python -m teq export` with the run's overrides instead of its id makes them again"
        )
    return plan, artefact, found


def _run(job: Job, form: str | None) -> tuple[Plan, Artefact, Record]:
    """Return the run of a job; stages that are not stored are made."""
    plan = plan_of(job.run.plain(), job.run.model)
    if form is not None:
        formats.check(form, plan)
    home, store = config.home(), Store(config.home() / "store")
    with locks.taken(job.options.device) as device:
        runtime = dataclasses.replace(job.options, device=resolve(device))
        weights = _weights(job.run, store, home, runtime)
        return plan, weights, pipeline.run(job.run, store, home, runtime, None)


def _weights(run: Run, store: Store, home: Path, runtime: Runtime) -> Artefact:
    """Return the weights of a run with their tensors checked; the model in memory is let go."""
    model = LoadedModel(run.model, run.dtype, runtime.device)
    failed = home / "failed" / f"{run.key()}.safetensors"
    stages = Chain(run, model, runtime, lambda *_: None, failed).stages()
    return store.get(stages[final_weights(stages)], runtime.device, content=True)


def plan_of(run: Mapping[str, Any], checkpoint: Checkpoint) -> Plan:
    """Return the plan of a run as records describe it. Raises UserError for one in floating point."""
    quantizer = run["quantizer"]
    if quantizer["grid"] is None:
        raise UserError(
            "a run in floating point is not exported: choose a method that quantizes, such as rtn"
        )
    grid = Grid(**_fields(quantizer["grid"]))
    moving = quantizer.get("act_order", False) and not quantizer["static_groups"]
    return Plan(checkpoint, run["dtype"], grid, moving and grid.group_size != -1)


def checkpoint_of(run: Mapping[str, Any], identity: str) -> Checkpoint:
    """Return the checkpoint of a record. Raises UserError where only overrides tell where its files are."""
    model, fields = run["model"], _fields(run["model"]["source"])
    kind = model["source"]["kind"]
    if kind == "Folder":
        raise UserError(
            f"the run read its weights from a folder {fields['path']!r}, which no record locates: give "
            "run.py's overrides with model.path=<folder> instead of its id"
        )
    if kind == "Hub":
        fields["revision"] = identity.rpartition("@")[2]
    return Checkpoint(name=model["name"], source=SOURCES[kind](**fields), arch=arch_of(run))


def arch_of(run: Mapping[str, Any]) -> Arch:
    """Return the architecture of a record, which has no words for messages."""
    return Arch(name=run["model"]["name"], because="it was refused", **_fields(run["model"]["arch"]))


def _fields(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of settings as a record holds them."""
    return {name: value for name, value in plain.items() if name not in ("kind", "version")}
