"""Sets from the Hugging Face hub or its local cache, through `datasets`, at a resolved commit."""

import functools
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teq.corpora.mirror import check_schema
from teq.corpora.sources import Source
from teq.spec import UserError

if TYPE_CHECKING:
    import pyarrow

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hosted:
    """A set of the hub at a commit. It is always whole: another number of rows is an error."""

    name: str
    source: Source
    commit: str
    partial = False

    def provenance(self) -> dict[str, Any]:
        """Name, repository and commit, and how many rows are read."""
        rows = self.source.expected
        where = {"repo": self.source.repo, "revision": self.commit}
        return {"name": self.name, **where, "rows": rows, "expected_rows": rows, "partial": False}

    def table(self) -> "pyarrow.Table":
        """The rows that are read."""
        return self.all_rows().slice(0, self.source.first)

    def all_rows(self) -> "pyarrow.Table":
        """The whole split, downloaded where the cache lacks it. Raises UserError."""
        import datasets

        quiet()
        where, source = f"{self.source.repo}@{self.commit}", self.source
        files = {source.split: source.data_file} if source.data_file else None
        try:
            loaded = datasets.load_dataset(
                source.repo,
                source.config,
                data_files=files,
                split=source.split,
                revision=self.commit,
                verification_mode="no_checks",  # a single shard is not the size that its card gives
            )
        except Exception as error:  # datasets raises many kinds; each of them means the same to the user
            raise UserError(
                f"{self.name} could not be read from {where} ({_brief(error)}): {_ways(self.name)}"
            ) from error
        table = loaded.with_format("arrow")[:]
        check_schema(table.schema, source, where)
        if len(table) != source.rows:
            raise UserError(
                f"{where} gives {len(table)} rows of {self.name}: the whole split has {source.rows}"
            )
        return table


def find(name: str, source: Source) -> Hosted:
    """The set at the commit that its revision means now, or in the local cache. Raises UserError."""
    return Hosted(name, source, _commit(name, source.repo, source.revision, source.config, source.data_file))


def quiet() -> None:
    """Keep the log and the bars of `datasets` out of ours."""
    import datasets

    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


@functools.cache
def _commit(name: str, repo: str, revision: str, config: str | None, data_file: str | None) -> str:
    """The commit, asked for once in a process: it enters the key of everything that reads the set."""
    from huggingface_hub import HfApi, constants

    cached = _cached_commit(repo, f"{config or '*'}{'-*' if data_file else ''}")
    if constants.HF_HUB_OFFLINE:
        if cached is None:
            raise UserError(
                f"{name} is neither in a mirror nor in the local hub cache, and HF_HUB_OFFLINE is set: "
                f"{_ways(name)}"
            )
        return cached
    try:
        return str(HfApi().dataset_info(repo, revision=revision, timeout=10).sha)
    except Exception as error:  # no route, no name, a proxy's refusal: the cache is what remains
        if cached is None:
            raise UserError(
                f"{name} is in no mirror and {repo} is out of reach ({_brief(error)}): {_ways(name)}"
            ) from None
        log.warning("hub out of reach, using the cached %s@%s", repo, cached)
        return cached


def _cached_commit(repo: str, config: str) -> str | None:
    """The commit that `datasets` prepared last.

    It keeps what it prepared in <owner>___<name>/<config>[-<files>]/<version>/<commit>.
    """
    from huggingface_hub import constants

    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets").expanduser()
    owner, _, name = repo.rpartition("/")
    prepared = [
        folder
        for folder in cache.glob(f"{owner}___{name.lower()}/{config}/*/*")
        if re.fullmatch("[0-9a-f]{40}", folder.name)
    ]
    return max(prepared, key=lambda folder: folder.stat().st_mtime).name if prepared else None


def _ways(name: str) -> str:
    return (
        f"set TEQ_DATA to a folder that holds it (`python -m teq prefetch {name}` makes one where there is a "
        "network), or let the Hugging Face hub be reached"
    )


def _brief(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200]
