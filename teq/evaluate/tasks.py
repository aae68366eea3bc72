"""Zero-shot tasks of lm-evaluation-harness, with documents from where `teq.data` finds them."""

import functools
import hashlib
import logging
import math
import random
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teq import data, statistics
from teq.device.runtime import Runtime
from teq.spec import UserError, option
from teq.stage import Evaluation, Metric

if TYPE_CHECKING:
    import numpy as np
    import pyarrow
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.task import Task as HarnessTask

    from teq.models.checkpoint import LM

FOLDERS = {  # where lm-eval keeps a task: indexing one folder takes milliseconds, indexing all many seconds
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "piqa": "piqa",
    "lambada_openai": "lambada",
}


@dataclass(frozen=True, kw_only=True)
class Task(Evaluation):
    """A task that lm-eval knows, on `limit` documents drawn with `seed` (all when null).

    The draw does not follow the run's seed, so that all methods and seeds are compared on the same documents,
    and the documents of a smaller limit are among those of a larger one.
    """

    group = "tasks"
    task: str = option(among=tuple(FOLDERS))
    limit: int | None = option(None, at_least=1)
    seed: int = option(0, at_least=0)

    @property
    def name(self) -> str:
        """Return what records and tables call it."""
        return self.task

    def provenance(self) -> dict[str, Any]:
        """Return what identifies the documents and their requests; it enters the stage's key."""
        return {**data.provenance(self.task), "lm_eval": metadata.version("lm_eval")}

    def measure(self, lm: "LM", runtime: Runtime) -> Metric:
        """Return `acc` (and `acc_norm` where the task has it) with standard errors; see `score`."""
        import_lm_eval()
        import lm_eval.tasks

        folder = Path(lm_eval.tasks.__file__).parent / FOLDERS[self.task]
        manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(folder))
        if self.task not in manager.all_subtasks:
            version = metadata.version("lm_eval")
            raise UserError(f"lm-eval {version} has no task {self.task} in {folder}: install lm-eval 0.4.13")
        split = data.source(self.task).split
        where = {"custom_dataset": functools.partial(_split, split, self.task), "training_split": None}
        group = {"group": "teq", "task": [{"task": self.task, "num_fewshot": 0, **where}]}
        task = manager.load([group])["tasks"][self.task]
        if task.config.process_docs is not None:  # which lm-eval would repeat whenever it looks at documents
            task.config.process_docs = lambda _: task.task_docs
        return score(task, self.limit, self.seed, self.provenance(), lm, runtime)


def import_lm_eval() -> None:
    """Import lm-eval (seconds) and keep its log and bars out of ours."""
    import lm_eval.api.task

    data.hub.quiet()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = lambda items, **_: items  # it draws a bar for making requests, terminal or not


def score(
    task: "HarnessTask", limit: int | None, seed: int, provenance: dict[str, Any], lm: "LM", runtime: Runtime
) -> Metric:
    """Run `task` on a seeded sample of its documents.

    Arrays, in the order of `document [docs]`: `correct` and `correct_norm [docs]` of 0 and 1, and
    `loglikelihood [docs, choices]`, NaN where a document has fewer choices than others.
    """
    import numpy as np
    from lm_eval.evaluator import evaluate

    from teq.evaluate.scoring import SharedContextLM

    name, total = task.config.task, len(task.task_docs)
    documents = sample_documents(total, limit, seed)
    scorer = SharedContextLM(lm.model, lm.tokenizer, runtime.batch_size, partial=runtime.partial)
    found = evaluate(
        lm=scorer,
        task_dict={"tasks": {name: task}},
        samples=None if len(documents) == total else {name: documents},
        bootstrap_iters=0,  # standard errors are computed from what is recorded
    )
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    likelihoods = [[answer[0] for answer in sample["filtered_resps"]] for sample in samples]
    arrays = {
        "document": np.asarray([sample["doc_id"] for sample in samples], dtype=np.int32),
        "loglikelihood": _padded(likelihoods),
    }
    values = {}
    for metric, array in (("acc", "correct"), ("acc_norm", "correct_norm")):
        if metric in samples[0]:
            arrays[array] = np.asarray([sample[metric] for sample in samples], dtype=np.uint8)
            values[metric] = float(arrays[array].mean())
            error = statistics.stderr_of_mean(arrays[array])
            values |= {} if math.isnan(error) else {f"{metric}_stderr": error}
    if not np.isfinite(arrays["loglikelihood"]).any(axis=1).all():
        raise UserError(
            f"log-likelihoods of {name} are not finite: the model is broken, or use dtype=float32"
        )
    info = {
        "documents": len(documents),
        "available_documents": total,
        "documents_sha256": hashlib.sha256(np.asarray(documents, dtype="<i8").tobytes()).hexdigest(),
        "task_version": found["versions"][name],
        "bos": _bos(scorer),
        "truncated": scorer.truncated,
        "batch_size": scorer.batch_size,  # as it was at the end: it is halved where memory runs out
    }
    return Metric(values=values, arrays=arrays, info={**info, **provenance})


def sample_documents(total: int, limit: int | None, seed: int) -> list[int]:
    """Return ascending indices of `limit` of `total` documents (None: all), the first of a seeded shuffle."""
    order = list(range(total))
    random.Random(seed).shuffle(order)
    return sorted(order[:limit])


def dataset(split: str, rows: "pyarrow.Table") -> dict[str, Any]:
    """Return documents as lm-eval wants to find them: a `datasets.Dataset` by split, in memory."""
    import datasets

    return {split: datasets.Dataset(rows)}


def _split(split: str, name: str, **_: Any) -> dict[str, Any]:
    """Return what lm-eval's `custom_dataset` asks for; the task's metadata come as further arguments."""
    return dataset(split, data.task_rows(name))


def _padded(rows: list[list[float]]) -> "np.ndarray":
    """Return `[rows, longest]` fp32, NaN behind the end of a shorter row."""
    import numpy as np

    out = np.full((len(rows), max(map(len, rows))), np.nan, dtype=np.float32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def _bos(scorer: "TemplateLM") -> str | None:
    """Return the token that the tokenizer itself puts in front of every context, or None."""
    with_special = scorer.tok_encode("a")
    plain = scorer.tok_encode("a", add_special_tokens=False)
    return None if with_special == plain else scorer.tokenizer.decode(with_special[:1])
