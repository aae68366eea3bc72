"""Any task or group that lm-evaluation-harness knows, or a task file of the user's, on its own documents."""

import difflib
import functools
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from teq.device.runtime import Runtime
from teq.evaluate.tasks import Harness, import_lm_eval, score
from teq.files.disk import one_line
from teq.spec import UserError, option
from teq.stage import Metric

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import TaskDict

    from teq.models.checkpoint import LM

PLACES = ("dataset", "metadata")  # settings of a task that hold paths; data and version count apart
HUB = re.compile(r"hf://datasets/(.+?@[0-9a-f]{40})/")


@dataclass(frozen=True, kw_only=True)
class LmEvalTask(Harness):
    """`limit` documents of each task (all when null), drawn with `seed`, after `num_fewshot` shots.

    Without `num_fewshot` the task's own number holds. `include_path` is a folder of task files that come
    before lm-eval's; what they contain is in the key, where they are is not.
    """

    task: str = option(key="evals=lm_eval/<task>")
    num_fewshot: int | None = option(None, at_least=0)
    limit: int | None = option(None, at_least=1)
    seed: int = option(0, at_least=0)
    include_path: str | None = option(None, hashed=False)

    @property
    def name(self) -> str:
        """Return what records and tables call it."""
        return f"lm_eval/{self.task}" + ("" if self.num_fewshot is None else f":{self.num_fewshot}")

    def provenance(self) -> dict[str, Any]:
        """Return what identifies documents, shots and prompts; enters the stage's key. Raises UserError."""
        return _loaded(self.task, self.num_fewshot, self.include_path)[1]

    def measure(self, lm: "LM", runtime: Runtime) -> Metric:
        """Return every metric of the task with what its uncertainty is computed from; see `score`."""
        loaded, provenance = _loaded(self.task, self.num_fewshot, self.include_path)
        return score(self, loaded, provenance, lm, runtime, self.limit, self.seed)


@functools.cache
def _loaded(name: str, shots: int | None, folder: str | None) -> tuple["TaskDict", dict[str, Any]]:
    """Return a task, or the tasks of a group, with their data, and what identifies them. Raises UserError."""
    import_lm_eval()
    manager = _manager(name, folder)
    try:
        loaded = manager.load([name])
        tasks: dict[str, Task] = loaded["tasks"]
        for each, task in tasks.items():
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                raise UserError(f"lm_eval/{name} is not possible: {each} runs generated code or reads images")
            own = task.get_config("num_fewshot")
            if shots and own == 0:
                raise UserError(f"lm_eval/{name}:{shots} is not possible: {each} is defined without shots")
            task.set_config("num_fewshot", (own or 0) if shots is None else shots)
        return loaded, _provenance(tasks)
    except UserError:
        raise
    except Exception as error:  # of datasets, the hub or the task's own code
        raise UserError(
            f"lm_eval/{name} could not be loaded ({one_line(error)}): let the Hugging Face hub be reached, "
            "or bring the cache (HF_HOME) of a machine that loaded it"
        ) from error


def _manager(name: str, folder: str | None) -> "TaskManager":
    """Return lm-eval's index that holds the task: that of `folder`, else lm-eval's own. Raises UserError."""
    if folder is not None and name in (own := _index(folder)).all_tasks:
        return own
    if name not in (every := _index(None)).all_tasks:
        close = difflib.get_close_matches(name, every.all_tasks, 1)
        hint = f"did you mean lm_eval/{close[0]}? " if close else ""
        version = metadata.version("lm_eval")
        raise UserError(
            f"evals=lm_eval/{name} is not allowed: lm-eval {version} has no such task; {hint}"
            "tasks.include_path=<folder> adds task files"
        )
    return every


@functools.cache
def _index(folder: str | None) -> "TaskManager":
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=folder is None, include_path=folder)


def _provenance(tasks: dict[str, "Task"]) -> dict[str, Any]:
    """Return versions, digests of documents, shots and prompts, and the known commits of data sets.

    Digests are of contents: the fingerprints of `datasets` depend on paths and times of local files.
    """
    shots = {name: task.get_config("num_fewshot") for name, task in tasks.items()}
    versions = {name: task.VERSION for name, task in tasks.items()}
    configs = [task.dump_config() for task in tasks.values()]
    prompts = [{key: one[key] for key in one if not key.startswith(PLACES)} for one in configs]
    read = (doc for task in tasks.values() for doc in task.eval_docs)
    shown = (doc for name, task in tasks.items() if shots[name] for doc in task.fewshot_docs())
    found = {
        "lm_eval": metadata.version("lm_eval"),
        "task_version": versions if len(tasks) > 1 else next(iter(versions.values())),
        "num_fewshot": shots if len(set(shots.values())) > 1 else next(iter(shots.values())),
        "prompts_sha256": _digest(prompts),
        "data_sha256": _digest(read),
        "shots_sha256": _digest(shown),
    }
    splits = [split for task in tasks.values() for split in (task.dataset or {}).values()]
    files = [file for split in splits for file in getattr(split.info, "download_checksums", None) or ()]
    commits = sorted({match[1] for file in files if (match := HUB.match(file))})
    return found | ({"commits": commits} if commits else {})


def _digest(parts: Iterable[Any]) -> str:
    """Return the SHA-256 of JSON values; anything else counts by its text, without addresses in memory."""
    found = hashlib.sha256()
    for part in parts:
        text = json.dumps(part, sort_keys=True, default=str)
        found.update(re.sub(r" at 0x[0-9a-f]+", "", text).encode() + b"\n")
    return found.hexdigest()
