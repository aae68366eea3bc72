"""Sets from the Hugging Face hub or its local cache, through `datasets`, at a resolved commit."""

import functools
import logging
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teq.data import sources
from teq.data.mirror import check_schema
from teq.data.sources import Source
from teq.files.disk import one_line
from teq.spec import UserError

if TYPE_CHECKING:
    import datasets
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
        """Return name, repository and commit, and how many rows are read."""
        rows = self.source.expected
        where = {"repo": self.source.repo, "revision": self.commit}
        return {"name": self.name, **where, "rows": rows, "expected_rows": rows, "partial": False}

    def table(self) -> "pyarrow.Table":
        """Return the rows that are read."""
        return self.all_rows().slice(0, self.source.first)

    def all_rows(self) -> "pyarrow.Table":
        """Return the whole split, downloaded where the cache lacks it. Raises UserError."""
        quiet()
        where, source = f"{self.source.repo}@{self.commit}", self.source
        try:
            loaded = self._load()
        except Exception as error:  # datasets raises many kinds; each of them means the same to the user
            raise UserError(
                f"{self.name} could not be read from {where} ({one_line(error)}): {_ways(self.name)}"
            ) from error
        table = loaded.with_format("arrow")[:]
        check_schema(table.schema, source, where)
        if len(table) != source.rows:
            raise UserError(
                f"{where} gives {len(table)} rows of {self.name}: the whole split has {source.rows}"
            )
        return table

    def _load(self) -> "datasets.Dataset":
        import datasets
        from huggingface_hub import hf_hub_download

        repo, file = self.source.repo, self.source.data_file
        if file is None:
            return datasets.load_dataset(
                repo, self.source.config, split=self.source.split, revision=self.commit
            )
        # what load_dataset(data_files=...) has cached it does not find again when it is offline
        path = hf_hub_download(repo, file, repo_type="dataset", revision=self.commit)
        read = datasets.Dataset.from_parquet if file.endswith(".parquet") else datasets.Dataset.from_json
        return read(path)


def find(name: str, source: Source) -> Hosted:
    """Find the set at the commit of its revision, or in the local cache. Raises UserError."""
    return Hosted(name, source, _commit(name))


def quiet() -> None:
    """Keep the log and the bars of `datasets` out of ours; downloads show theirs on a terminal."""
    import datasets
    import huggingface_hub.utils

    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()


@functools.cache
def _commit(name: str) -> str:
    """Return the commit, asked for once per process: it is in the key of everything that reads the set."""
    from huggingface_hub import HfApi, constants

    wanted = sources.source(name)
    cached = _cached_commit(wanted)
    if constants.HF_HUB_OFFLINE:
        if cached is None:
            raise UserError(
                f"{name} is neither in a mirror nor in the local hub cache, and HF_HUB_OFFLINE is set: "
                f"{_ways(name)}"
            )
        return cached
    try:
        return str(HfApi().dataset_info(wanted.repo, revision=wanted.revision, timeout=10).sha)
    except Exception as error:  # no route, no name, a proxy's refusal: the cache is what remains
        if cached is None:
            raise UserError(
                f"{name} is in no mirror and {wanted.repo} is out of reach ({one_line(error)}): {_ways(name)}"
            ) from None
        log.warning("hub out of reach, using the cached %s@%s", wanted.repo, cached)
        return cached


def _cached_commit(source: Source) -> str | None:
    """Return the commit that was downloaded last, or None.

    The hub's cache keeps a file in datasets--<owner>--<name>/snapshots/<commit>/<file>, and `datasets`
    what it has prepared in <owner>___<name>/<config>/<version>/<commit>.
    """
    from huggingface_hub import constants

    owner, _, name = source.repo.rpartition("/")
    if source.data_file is not None:
        snapshots = Path(constants.HF_HUB_CACHE) / f"datasets--{owner}--{name}" / "snapshots"
        found = [folder for folder in snapshots.glob("*") if (folder / source.data_file).exists()]
    else:
        cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets").expanduser()
        prepared = (cache / f"{owner}___{name.lower()}").glob(f"{source.config or '*'}/*/*")
        found = [folder for folder in prepared if re.fullmatch("[0-9a-f]{40}", folder.name)]
    return max(found, key=lambda folder: folder.stat().st_mtime).name if found else None


def _ways(name: str) -> str:
    return (
        f"set TEQ_DATA to a folder that holds it (`python -m teq prefetch {name}` makes one where there is a "
        "network), or let the Hugging Face hub be reached"
    )
