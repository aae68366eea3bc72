"""Tasks of lm-evaluation-harness: making and scoring requests, and four tasks on `teq.data`'s documents."""

import contextlib
import functools
import hashlib
import logging
import math
import random
from collections.abc import Mapping, Sequence
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
    from lm_eval.tasks.manager import TaskDict
    from transformers import PreTrainedTokenizerBase

    from teq.models.checkpoint import LM

FOLDERS = {  # where lm-eval keeps a task: indexing one folder takes milliseconds, indexing all many seconds
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "piqa": "piqa",
    "lambada_openai": "lambada",
}
ARRAYS = {"acc": "correct", "acc_norm": "correct_norm"}  # names of per-document values; others: the metric's


@dataclass(frozen=True, kw_only=True)
class Harness(Evaluation):
    """How lm-eval's requests become tokens.

    `bos` auto leaves the BOS token to the tokenizer. `pair` joint tokenizes context and continuation as one
    text, separate each alone, as lm-eval did until June 2023.
    """

    group = "tasks"
    bos: str | bool = option("auto", among=("auto", True, False), omitted="auto")
    pair: str = option("joint", among=("joint", "separate"), omitted="joint")
    chat_template: bool = option(False, omitted=False)

    def check_text(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Raise UserError if the tokenizer lacks what the requests need."""
        if self.bos is True and tokenizer.encode("a") == tokenizer.encode("a", add_special_tokens=False):
            raise UserError("tasks.bos=true is not possible: the model's tokenizer adds no BOS token")
        if self.chat_template and not tokenizer.chat_template:
            raise UserError("tasks.chat_template=true is not possible: the model's tokenizer has no template")


@dataclass(frozen=True, kw_only=True)
class Task(Harness):
    """A task that lm-eval knows, on `limit` documents drawn with `seed` (all when null).

    The draw does not follow the run's seed, so that all methods and seeds are compared on the same documents,
    and the documents of a smaller limit are among those of a larger one.
    """

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
        loaded = manager.load([group])
        loaded = {"tasks": loaded["tasks"]}
        task = loaded["tasks"][self.task]
        if task.config.process_docs is not None:  # which lm-eval would repeat whenever it looks at documents
            task.config.process_docs = lambda _: task.task_docs
        return score(self, loaded, self.provenance(), lm, runtime, self.limit, self.seed, only=tuple(ARRAYS))


def import_lm_eval() -> None:
    """Import lm-eval (seconds) and keep its log and bars out of ours."""
    import lm_eval.api.task

    data.hub.quiet()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = lambda items, **_: items  # it draws a bar for making requests, terminal or not


def score(
    how: Harness,
    loaded: "TaskDict",
    provenance: Mapping[str, Any],
    lm: "LM",
    runtime: Runtime,
    limit: int | None = None,
    seed: int = 0,
    only: Sequence[str] = (),
) -> Metric:
    """Run loaded tasks on a seeded sample of the documents of each; `only` names metrics to keep, if not all.

    Values are lm-eval's, without undefined ones: of the task or the group that holds all tasks under the
    metric's name, of a group's members under `<metric>/<member>`. A filter is part of the name:
    `<metric>,<filter>`. Arrays, in the order of tasks and of `document [docs]`: a metric's values `[docs]`
    (`correct` and `correct_norm` are acc and acc_norm), and `loglikelihood [docs, choices]`, NaN where a
    document has fewer choices than others.
    """
    import numpy as np
    import torch
    from lm_eval.api.metrics import mean
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.evaluator import evaluate

    from teq.evaluate.scoring import SharedContextLM
    from teq.models.head import check_head
    from teq.models.lazy import is_lazy

    check_head(lm.model, lm.arch)
    tasks, groups = loaded["tasks"], loaded.get("groups", {})
    totals = {name: len(task.eval_docs) for name, task in tasks.items()}
    drawn = {name: sample_documents(total, limit, seed) for name, total in totals.items()}
    for task in tasks.values():
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    for name, task in tasks.items():
        if task.OUTPUT_TYPE == "generate_until" and is_lazy(lm.model):
            raise UserError(
                f"{name} generates text, which would read all weights for every token under memory=stream: "
                "leave it out of evals, or give the memory of the whole model"
            )
    bos = how.bos if isinstance(how.bos, bool) else None
    scorer = SharedContextLM(
        lm.model, lm.tokenizer, runtime.batch_size, partial=runtime.partial, bos=bos, pair=how.pair
    )
    with torch.random.fork_rng([lm.device] if lm.device.type == "cuda" else []):
        torch.manual_seed(DEFAULT_OTHER_SEED)
        found = evaluate(
            lm=scorer,
            task_dict=loaded,
            samples={name: part for name, part in drawn.items() if len(part) < totals[name]} or None,
            bootstrap_iters=0,  # standard errors are computed from what is recorded
            apply_chat_template=how.chat_template,
            fewshot_as_multiturn=how.chat_template,
        )
    root = next(iter(groups), next(iter(tasks)) if len(tasks) == 1 else None)
    values = {
        f"{metric}{'' if name == root else f'/{name}'}": value
        for name, results in found["results"].items()
        for metric, value in _metrics(results).items()
        if not only or metric in only
    }
    samples = {name: sorted(found["samples"][name], key=lambda sample: sample["doc_id"]) for name in tasks}
    likelihoods = [row for name, task in tasks.items() for row in _likelihoods(task, samples[name])]
    if any(row and not np.isfinite(row).any() for row in likelihoods):
        raise UserError(
            f"log-likelihoods of {how.name} are not finite: the model is broken, or use dtype=float32"
        )
    documents = [one for part in drawn.values() for one in part]
    arrays = {"document": np.asarray(documents, dtype=np.int32)}
    if any(likelihoods):
        arrays["loglikelihood"] = _padded(likelihoods)
    for metric, array in _arrays(samples).items():
        if only and metric not in only:
            continue
        arrays[ARRAYS.get(metric, metric)] = array
        name = metric.partition(",")[0]
        if len(tasks) == 1 and array.ndim == 1 and tasks[root].aggregation().get(name) is mean:
            error = statistics.stderr_of_mean(array)
            values |= {} if math.isnan(error) else {metric.replace(name, f"{name}_stderr", 1): error}
    versions = {name: found["versions"][name] for name in tasks}
    info = {
        "documents": len(documents),
        "available_documents": sum(totals.values()),
        "documents_sha256": hashlib.sha256(np.asarray(documents, dtype="<i8").tobytes()).hexdigest(),
        "task_version": versions[root] if len(tasks) == 1 else versions,
        "bos": _bos(scorer),
        "truncated": scorer.truncated,
        "batch_size": scorer.batch_size,  # as it was at the end: it is halved where memory runs out
    }
    if len(tasks) > 1:
        info["members"] = {name: len(part) for name, part in drawn.items()}
    options = {"pair": how.pair, "chat_template": how.chat_template}
    info |= {name: value for name, value in options.items() if value not in ("joint", False)}
    return Metric(values=values, arrays=arrays, info={**info, **provenance})


def _metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the values of lm-eval's metrics, `<metric>,<filter>` without the filter none."""
    named = {key.removesuffix(",none"): value for key, value in results.items() if "," in key}
    return {
        key: float(value)
        for key, value in named.items()
        if isinstance(value, int | float)
        and math.isfinite(value)
        and not key.partition(",")[0].endswith("_stderr")
    }


def _arrays(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, "np.ndarray"]:
    """Return by metric the documents' values, task after task, where all tasks have it as numbers."""
    import numpy as np

    columns: dict[str, list[Any]] = {}
    for sample in (sample for part in samples.values() for sample in part):
        for metric in sample["metrics"]:
            columns.setdefault(f"{metric},{sample['filter']}".removesuffix(",none"), []).append(
                sample[metric]
            )
    count = sum(len({sample["doc_id"] for sample in part}) for part in samples.values())
    found = {}
    for metric, column in columns.items():
        with contextlib.suppress(ValueError, TypeError):  # texts, or pairs of unequal length
            array = np.asarray(column, dtype=np.float64)
            if len(array) == count:
                found[metric] = array.astype(np.uint8 if np.isin(array, (0, 1)).all() else np.float32)
    return found


def _likelihoods(task: "HarnessTask", samples: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """Return the log-likelihoods of each document's requests; none of generated text."""
    if task.OUTPUT_TYPE == "generate_until":
        return [[] for _ in {sample["doc_id"] for sample in samples}]
    first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    return [[a[0] if isinstance(a, tuple | list) else a for a in one["filtered_resps"]] for one in first]


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
