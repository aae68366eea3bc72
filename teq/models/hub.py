"""Checkpoints of the Hugging Face hub: which commit a revision means, and its files."""

import contextlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from teq.files import disk
from teq.files.disk import one_line, user_cache
from teq.models.folder import WEIGHTS, Saved, dimensions_in
from teq.spec import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

log = logging.getLogger(__name__)
ELSEWHERE = (
    "give a local folder with model.path=<folder>, or a mirror in the environment variable HF_ENDPOINT"
)
SHARD = r"-\d+-of-\d+\.safetensors$"
BOT, CONVERSION = "SFconvertbot", "Adding `safetensors` variant of this model"


@dataclass(frozen=True, kw_only=True)
class Hub(Saved):
    """A checkpoint of the Hugging Face hub, or of its local cache when offline."""

    repo: str
    revision: str = "main"

    def fingerprint(self, device: str = "cpu") -> str:
        """Return `repo@commit`: the hub, or without a network its local cache, resolves the revision."""
        return f"{self.repo}@{self._commit()}"

    def folder(self) -> Path:
        """Return the snapshot's folder, downloaded where it is missing."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        patterns = [WEIGHTS, "*.json", "*.model", "*.txt", "*.jinja"]
        commit = self._commit()
        with contextlib.suppress(LocalEntryNotFoundError):
            cached = Path(
                snapshot_download(self.repo, revision=commit, local_files_only=True, allow_patterns=patterns)
            )
            if _complete(cached):
                return cached
        with self._fetching(commit):
            return Path(snapshot_download(self.repo, revision=commit, allow_patterns=patterns))

    def dimensions(self) -> "PretrainedConfig":
        """Return the dimensions of the architecture; of the files only the configuration is fetched."""
        from huggingface_hub import hf_hub_download

        commit = self._commit()
        with self._fetching(commit):
            file = hf_hub_download(self.repo, "config.json", revision=commit)
        return dimensions_in(Path(file).parent)

    @contextlib.contextmanager
    def _fetching(self, commit: str) -> Iterator[None]:
        """Context manager: convert the hub client's errors to UserError."""
        from huggingface_hub.errors import GatedRepoError

        try:
            yield
        except GatedRepoError:
            raise self._gated() from None
        except Exception as error:  # the client raises many kinds; each means the same to the user
            raise UserError(
                f"{self.repo}@{commit} could not be downloaded ({one_line(error)}): {ELSEWHERE}"
            ) from error

    def _commit(self) -> str:
        """Return the revision's commit, asked for once per process, so that all keys name the same."""
        known = (self.repo, self.revision)
        if known not in _commits:
            _commits[known] = self._resolved()
            with contextlib.suppress(OSError):  # a folder that cannot be written costs the note alone
                disk.write_text(self._note(), _commits[known])
        return _commits[known]

    def _note(self) -> Path:
        """Return where the commit is noted: the hub's cache has no revision for downloads by commit."""
        name = f"{self.repo}@{self.revision}".replace("/", "--")
        return user_cache() / "revisions" / name

    def _gated(self) -> UserError:
        return UserError(
            f"{self.repo} is gated: accept its licence on the hub and log in with `hf auth login`, "
            f"or {ELSEWHERE}"
        )

    def _resolved(self) -> str:
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        cached = self._cached_commit()
        if constants.HF_HUB_OFFLINE:
            if cached is None:
                raise UserError(
                    f"{self.repo}@{self.revision} is not in the local hub cache {constants.HF_HUB_CACHE} and "
                    f"HF_HUB_OFFLINE is set: {ELSEWHERE}"
                )
            return cached
        try:
            info = HfApi().model_info(self.repo, revision=self.revision, timeout=10)
        except GatedRepoError:
            raise self._gated() from None
        except (RepositoryNotFoundError, RevisionNotFoundError):
            raise UserError(
                f"{self.repo}@{self.revision} does not exist on the hub, or is private: {ELSEWHERE}"
            ) from None
        except Exception as error:  # no route, no name, a proxy's refusal: the cache is what remains
            if cached is None:
                raise UserError(
                    f"{self.repo}@{self.revision}: the hub is out of reach ({one_line(error)}) and the local "
                    f"cache {constants.HF_HUB_CACHE} does not hold it: {ELSEWHERE}"
                ) from None
            log.warning("hub out of reach, using the cached %s@%s", self.repo, cached)
            return cached
        if any(file.rfilename.endswith(".safetensors") for file in info.siblings or []):
            return str(info.sha)
        converted = self._converted_commit() if self.revision == "main" else None
        if converted is None:
            raise UserError(
                f"{self.repo}@{self.revision} has no safetensors and pickles are not loaded: choose another "
                "revision with model.source.revision=<revision>, or convert it once with save_pretrained and "
                "pass model.path=<folder>"
            )
        return converted

    def _cached_commit(self) -> str | None:
        from huggingface_hub import try_to_load_from_cache

        noted = [self._note().read_text()] if self._note().is_file() else []
        for revision in (self.revision, *noted):
            config = try_to_load_from_cache(self.repo, "config.json", revision=revision)
            if isinstance(config, str) and _complete(Path(config).parent):
                return Path(config).parent.name
        return None

    def _converted_commit(self) -> str | None:
        """Return the commit of the hub's own safetensors conversion, or None.

        It is an open pull request of the hub's conversion bot.
        """
        from huggingface_hub import get_repo_discussions, list_repo_commits

        try:
            found = get_repo_discussions(self.repo, author=BOT, discussion_type="pull_request")
            for request in found:
                if request.status == "open" and request.title == CONVERSION:
                    reference = f"refs/pr/{request.num}"
                    commit = str(list_repo_commits(self.repo, revision=reference)[0].commit_id)
                    log.warning("%s has no safetensors at %s: using %s", self.repo, self.revision, reference)
                    return commit
        except Exception as error:  # a mirror need not have the interface to pull requests
            raise UserError(
                f"{self.repo}@{self.revision} has no safetensors, and whether the hub has converted it could "
                f"not be found out ({one_line(error)}): convert it once with save_pretrained and pass "
                "model.path=<folder>"
            ) from error
        return None


_commits: dict[tuple[str, str], str] = {}


def _complete(folder: Path) -> bool:
    """Return whether a snapshot holds its weights, all shards of them."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text())["weight_map"].values())
        return all((folder / shard).is_file() for shard in shards)
    found = [file.name for file in folder.glob(WEIGHTS) if file.is_file()]
    return any(re.search(SHARD, name) is None for name in found)  # of how many shards only the index tells
