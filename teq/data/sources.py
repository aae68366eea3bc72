"""The public sets by name, as data: what they must hold, and where mirrors and the hub keep them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from teq.spec import UserError

TEXT = {"text": "string"}
SENTENCE = {"sentence": "string"}
C4_SHARD = {"repo": "allenai/c4", "data_file": "en/c4-validation.00000-of-00008.json.gz"}
PTB = {"repo": "ptb-text-only/ptb_text_only", "revision": "refs/convert/parquet"}  # main holds a script


@dataclass(frozen=True)
class Source:
    """One split of one set.

    `file` is its place in a mirror, without `.parquet`; `columns` the Arrow types that are read; `rows` how
    many the whole split has, `first` how many of them are read where that is less. `sample` is a file that a
    mirror may hold instead, `whole` the reason where a part of the split cannot be used, `known` what readers
    of numbers should know of a file, by its SHA-256.
    """

    file: str
    columns: Mapping[str, str]
    rows: int
    repo: str
    config: str | None = None
    data_file: str | None = None
    revision: str = "main"
    first: int | None = None
    sample: str | None = None
    whole: str | None = None
    known: Mapping[str, str] = field(default_factory=dict)

    @property
    def split(self) -> str:
        """Return the split's name, in the mirror and on the hub."""
        return self.file.rpartition("/")[2]

    @property
    def expected(self) -> int:
        """Return how many rows are read when nothing is missing."""
        return self.first or self.rows


SOURCES = {
    "wikitext2": Source("wikitext-2-raw-v1/test", TEXT, 4358, "Salesforce/wikitext", "wikitext-2-raw-v1"),
    "ptb": Source(
        "ptb_text_only/validation",
        SENTENCE,
        3370,
        **PTB,
        data_file="penn_treebank/validation/0000.parquet",
    ),
    "ptb-new": Source(
        "ptb_text_only/test", SENTENCE, 3761, **PTB, data_file="penn_treebank/test/0000.parquet"
    ),
    "c4": Source(
        "c4/validation",
        TEXT,
        45576,
        **C4_SHARD,
        whole="it draws documents at random from the whole shard, so a part of it gives other windows, out "
        "of the few documents in it that are longer than one; use c4-new, which reads the head of the shard",
    ),
    "c4-new": Source("c4/validation", TEXT, 45576, **C4_SHARD, first=1100),
    "pile-10k": Source("pile/train", TEXT, 10000, "NeelNanda/pile-10k", sample="pile/validation"),
    "hellaswag": Source(
        "hellaswag/validation",
        {
            "activity_label": "string",
            "ctx_a": "string",
            "ctx_b": "string",
            "endings": "list<string>",
            "label": "string",
        },
        10042,
        "Rowan/hellaswag",
        known={
            "5615cf961a7b8ba52eeee31b1c94f4d4e8319a6394b836410693f090cbbd6273": "put together from several "
            "public copies, with one leading space missing in about 40 % of the WikiHow endings: its "
            "accuracies compare with each other, not to the digit with published ones",
        },
    ),
    "winogrande": Source(
        "winogrande_xl/validation",
        {"sentence": "string", "option1": "string", "option2": "string", "answer": "string"},
        1267,
        "allenai/winogrande",
        "winogrande_xl",
    ),
    "piqa": Source(
        "piqa/validation",
        {"goal": "string", "sol1": "string", "sol2": "string", "label": "integer"},
        1838,
        "baber/piqa",
    ),
    "lambada_openai": Source("lambada_openai/test", TEXT, 5153, "EleutherAI/lambada_openai", "default"),
}


def source(name: str) -> Source:
    """Return the source called `name`. Raises UserError."""
    if name not in SOURCES:
        raise UserError(f"the set {name!r} is unknown: choose one of {', '.join(SOURCES)}")
    return SOURCES[name]
