"""lastword-python-docs: a cloze in the manner of LAMBADA, made from the text that is always at hand.

LAMBADA (Paperno et al. 2016) asks for the last word of a passage, a word that the passage mostly names
before. So here: a passage is a run of words of one paragraph of prose, its last word has occurred in it, and
a model is right when greedy decoding gives that word.
"""

import functools
import re
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from teq import data
from teq.data.embedded import python_docs
from teq.device.runtime import Runtime
from teq.evaluate.tasks import Harness, dataset, import_lm_eval, score
from teq.stage import Metric

if TYPE_CHECKING:
    from teq.models.checkpoint import LM

NAME = "lastword-python-docs"
ITEMS = 320
# Calibration ends at token 55 000 and evaluation starts at 60 000. Tokens of this text are 4.1 characters
# long on average with a vocabulary of 49 152; behind this many characters is behind token 60 000 for any
# below 5.
START = 300_000
# Words and marks of a context, at most and at least. A tokenizer with a vocabulary for English needs up to
# 1.4 tokens for each, so that contexts stay within 48 tokens; one that reads bytes needs more.
LONGEST, SHORTEST = 28, 8
PIECE = re.compile(r"\w+|[^\w\s]")
TARGET = re.compile(r"([a-z]{4,})[.,;:]?")
NOT_PROSE = re.compile(r">>>|\||\+-|::=")


@dataclass(frozen=True, kw_only=True)
class LastWord(Harness):
    """The whole task: it is small, so it takes no limit."""

    version = 1

    @property
    def name(self) -> str:
        """Return what records and tables call it."""
        return NAME

    def provenance(self) -> dict[str, Any]:
        """Return what identifies the items; enters the stage's key."""
        return {**data.provenance(data.embedded.NAME), "lm_eval": metadata.version("lm_eval")}

    def measure(self, lm: "LM", runtime: Runtime) -> Metric:
        """Return `acc` with its standard error; see `teq.evaluate.tasks.score`."""
        import_lm_eval()
        import pyarrow
        from lm_eval.api.task import ConfigurableTask

        rows = pyarrow.table({"context": [i[0] for i in items()], "word": [i[1] for i in items()]})
        task = ConfigurableTask(
            config={
                "task": NAME,
                "custom_dataset": lambda **_: dataset("test", rows),
                "test_split": "test",
                "output_type": "loglikelihood",
                "doc_to_text": "{{context}}",
                "doc_to_target": "{{' ' + word}}",
                "num_fewshot": 0,
                "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
                "metadata": {"version": self.version},
            }
        )
        return score(self, {"tasks": {NAME: task}}, self.provenance(), lm, runtime)


@functools.cache
def items() -> list[tuple[str, str]]:
    """Return (context, last word) of `ITEMS` items, spread evenly over all that the text yields.

    Contexts do not overlap and none stands in the text before `START` as well, for topics repeat one another.
    """
    text = python_docs()
    start = text.index("\n\n", START)
    before = " ".join(text[:start].split())
    paragraphs = dict.fromkeys(" ".join(part.split()) for part in text[start:].split("\n\n"))
    passages = [
        passage
        for paragraph in paragraphs
        if not NOT_PROSE.search(paragraph)
        for passage in _passages(paragraph.split(" "))
        if passage[0] not in before
    ]
    found = list(dict.fromkeys(passages))
    return [found[i * len(found) // ITEMS] for i in range(ITEMS)]


def _passages(words: list[str]) -> list[tuple[str, str]]:
    """Return the non-overlapping passages of one paragraph, each as long as it may be."""
    found = []
    free = 0  # the first word that no passage has taken
    for i, word in enumerate(words):
        target = TARGET.fullmatch(word)
        if target is None or i - free < SHORTEST:
            continue
        start = free
        while len(pieces := PIECE.findall(" ".join(words[start:i]))) > LONGEST:
            start += 1
        if i - start >= SHORTEST and target[1] in pieces:
            found.append((" ".join(words[start:i]), target[1]))
            free = i + 1
    return found
