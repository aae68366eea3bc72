"""Experiment logging to Weights & Biases; `logger: null` logs nothing."""

import contextlib
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from teq.files.disk import one_line
from teq.spec import Settings, option

if TYPE_CHECKING:
    from teq.record import Record

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Wandb(Settings):
    """Reports to Weights & Biases; offline unless `mode` says otherwise. Its failures never stop a run."""

    group = "logger"
    project: str
    mode: str = option("offline", among=("offline", "online", "disabled"))

    def start(
        self, title: str, run: dict[str, Any], folder: str, group: str | None = None
    ) -> "WandbRun | contextlib.nullcontext[None]":
        """Open a run in the group of its experiment; without login or network, warn and log nothing."""
        import wandb

        try:
            settings = wandb.Settings(silent=True, console="off", init_timeout=20, reinit="create_new")
            opened = wandb.init(
                project=self.project,
                name=title,
                group=group,
                config=run,
                dir=folder,
                mode=self.mode,
                settings=settings,
            )
        except Exception as error:  # whatever goes wrong in there, the experiment matters more
            log.warning("wandb could not start (%s): this run is not logged there", one_line(error))
            return contextlib.nullcontext()
        return WandbRun(opened)


class WandbRun:
    """An open Weights & Biases run. What leaves the `with` by an error is closed there as failed."""

    def __init__(self, run: Any) -> None:
        self.run = run
        self.steps: set[int] = set()

    def __enter__(self) -> "WandbRun":
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        with contextlib.suppress(Exception):
            self.run.finish(exit_code=0 if kind is None else 1)

    def step(self, step: int, loss: float) -> None:
        """Log the training loss of a step."""
        self.steps.add(step)
        with contextlib.suppress(Exception):
            self.run.log({"train/loss": loss, "train/step": step})

    def table(self, rows: Sequence[Sequence[str]], picture: bytes | None) -> None:
        """Log an experiment's table, its header first, and its figure as a PNG."""
        import wandb

        try:
            data = [[None if value == "" else value for value in row] for row in rows[1:]]
            self.run.log({"table": wandb.Table(columns=list(rows[0]), data=data)})
            if picture is not None:
                from PIL import Image

                self.run.log({"figure": wandb.Image(Image.open(io.BytesIO(picture)))})
        except Exception as error:
            log.warning("wandb could not take the table (%s)", one_line(error))

    def finish(self, finished: "Record") -> None:
        """Log what came from the cache of the loss curve, and the tuning's, metrics and scale histograms."""
        import numpy as np
        import wandb

        try:
            for step, loss in enumerate(finished.data["training"]["loss"]):
                if step not in self.steps:
                    self.step(step, loss)
            for step, loss in enumerate(finished.data.get("finetune", {}).get("loss", [])):
                self.run.log({"finetune/loss": loss, "finetune/step": step})
            for name, metric in finished.metrics.items():
                self.run.log({f"{name}/{key}": value for key, value in metric["values"].items()})
            for site, summary in finished.data["training"]["scales"].items():
                bins = summary["s"]
                edges = np.linspace(bins["lowest"], bins["highest"], len(bins["counts"]) + 1)
                histogram = wandb.Histogram(np_histogram=(np.asarray(bins["counts"]), edges))
                self.run.log({f"scales/{site}": histogram})
            self.run.summary["record"] = finished.file.name
        except Exception as error:
            log.warning("wandb could not take the results (%s): the record has them", one_line(error))
