"""Checkpoints: where they come from, what identifies them, and how they become a model with its tokenizer."""

import contextlib
import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teq.arch import Arch
from teq.spec import Settings, UserError, digest, option

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)
ELSEWHERE = (
    "give a local folder with model.path=<folder>, or a mirror in the environment variable HF_ENDPOINT"
)
WEIGHTS = "*.safetensors"


@dataclass(frozen=True)
class LM:
    """A loaded checkpoint. `identity` names its weights (commit or digest); `arch` describes its family."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase | None"
    arch: Arch
    identity: str

    @property
    def device(self) -> "torch.device":
        """Where the input embeddings are: token ids go there."""
        return self.model.get_input_embeddings().weight.device


@dataclass(frozen=True, kw_only=True)
class Hub(Settings):
    """A checkpoint of the Hugging Face hub, or of its local cache when offline."""

    repo: str
    revision: str = "main"

    def identity(self) -> str:
        """`repo@commit`: the revision resolved by the hub, or by the local cache where the hub is out of
        reach.
        """
        return f"{self.repo}@{self._commit()}"

    def folder(self) -> Path:
        """The snapshot's folder, downloaded where it is missing."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        files = [WEIGHTS, "*.json", "*.model", "*.txt", "*.jinja"]
        commit = self._commit()
        with contextlib.suppress(LocalEntryNotFoundError):
            cached = Path(
                snapshot_download(self.repo, revision=commit, local_files_only=True, allow_patterns=files)
            )
            if _complete(cached):
                return cached
        try:
            return Path(snapshot_download(self.repo, revision=commit, allow_patterns=files))
        except (
            Exception
        ) as error:  # the hub's client raises many kinds; each of them means the same to the user
            raise UserError(
                f"{self.repo}@{commit} could not be downloaded ({_brief(error)}): {ELSEWHERE}"
            ) from error

    def _commit(self) -> str:
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
            raise UserError(
                f"{self.repo} is gated: accept its licence on the hub and log in with `hf auth login`, "
                f"or {ELSEWHERE}"
            ) from None
        except (RepositoryNotFoundError, RevisionNotFoundError):
            raise UserError(
                f"{self.repo}@{self.revision} does not exist on the hub, or is private: {ELSEWHERE}"
            ) from None
        except Exception as error:  # no route, no name, a proxy's refusal: the cache is what remains
            if cached is None:
                raise UserError(
                    f"{self.repo}@{self.revision}: the hub is out of reach ({_brief(error)}) and the local "
                    f"cache {constants.HF_HUB_CACHE} does not hold it: {ELSEWHERE}"
                ) from None
            log.warning("hub out of reach, using the cached %s@%s", self.repo, cached)
            return cached
        if any(file.rfilename.endswith(".safetensors") for file in info.siblings or []):
            return str(info.sha)
        return self._converted_commit()

    def _cached_commit(self) -> str | None:
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(self.repo, "config.json", revision=self.revision)
        return Path(config).parent.name if isinstance(config, str) else None

    def _converted_commit(self) -> str:
        """The commit of the hub's own safetensors conversion (an open pull request) of a repository
        without them.
        """
        from huggingface_hub import get_repo_discussions, list_repo_commits

        for discussion in get_repo_discussions(self.repo):
            if (
                discussion.is_pull_request
                and discussion.title == "Adding `safetensors` variant of this model"
            ):
                reference = f"refs/pr/{discussion.num}"
                log.warning("%s has no safetensors at %s: using %s", self.repo, self.revision, reference)
                return str(list_repo_commits(self.repo, revision=reference)[0].commit_id)
        raise UserError(
            f"{self.repo}@{self.revision} has no safetensors and pickles are not loaded: choose another "
            "revision with model.source.revision=<revision>, or convert it once with save_pretrained and "
            "pass model.path=<folder>"
        )


@dataclass(frozen=True, kw_only=True)
class Folder(Settings):
    """A checkpoint in a local folder, in the layout of `save_pretrained`."""

    path: str

    def identity(self) -> str:
        """Digest over the configuration, the tokenizer and the weights: moving the folder changes nothing."""
        folder = self.folder()
        files = sorted(f for f in folder.iterdir() if f.suffix in (".safetensors", ".json", ".model"))
        return "sha256:" + digest({file.name: file_digest(file) for file in files})

    def folder(self) -> Path:
        """The folder itself. Raises UserError when it is missing or incomplete."""
        folder = Path(self.path).expanduser()
        if not folder.is_dir():
            raise UserError(f"model.path={self.path} is not a folder: give one that save_pretrained wrote")
        if not (folder / "config.json").is_file():
            raise UserError(
                f"model.path={self.path} holds no config.json: give a folder that save_pretrained wrote"
            )
        if not any(folder.glob(WEIGHTS)):
            raise UserError(
                f"model.path={self.path} holds no safetensors: save the model with save_pretrained "
                "(no pickles are loaded)"
            )
        return folder


@dataclass(frozen=True, kw_only=True)
class Wheel(Settings):
    """A GGUF checkpoint inside a wheel of the Python package index: a real model where no hub can be
    reached.
    """

    version = 1
    requirement: str
    member: str
    sha256: str

    def identity(self) -> str:
        """The GGUF file's digest and the version of its conversion."""
        return f"gguf:{self.sha256}.{self.version}"

    def folder(self) -> Path:
        """The converted checkpoint in the user's cache, fetched and converted once."""
        from teq.wheel import converted

        return converted(self)


@dataclass(frozen=True, kw_only=True)
class Random(Settings):
    """A model with seeded random weights from a few numbers of configuration: the same everywhere, nothing
    to fetch.
    """

    config: dict[str, Any]
    seed: int = option(0, at_least=0)
    bos: bool = True

    def identity(self) -> str:
        """The settings themselves: they determine the weights."""
        return f"random:{self.key()}"

    def folder(self) -> None:
        """There is no folder: the model is made in memory."""


@dataclass(frozen=True, kw_only=True)
class Synthetic(Settings):
    """An architecture of true size filled with seeded random weights, to measure time and memory on any
    machine that holds it; never quality. `teq.random_model.fill` gives the distribution. The weights are made
    on the device, so that a CPU's differ from a GPU's.
    """

    version = 1
    config: dict[str, Any]
    seed: int = option(0, at_least=0)

    def identity(self) -> str:
        """The settings themselves."""
        return f"synthetic:{self.key()}"

    def folder(self) -> None:
        """There is no folder: the model is made in memory."""


@dataclass(frozen=True, kw_only=True)
class Outline(Settings):
    """A model without weights, for counting: its architecture on PyTorch's meta device, from the dimensions
    in conf/model, so that nothing is fetched or allocated whatever its size. It has no tokenizer and computes
    nothing.
    """

    config: dict[str, Any]

    def identity(self) -> str:
        """The dimensions themselves."""
        return f"outline:{self.key()}"

    def folder(self) -> None:
        """There is no folder."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Settings):
    """A model as the user names it: where it comes from and which family it is."""

    group = "model"
    name: str
    source: Hub | Folder | Wheel | Random | Synthetic | Outline
    arch: Arch

    def config(self) -> "PretrainedConfig":
        """The dimensions of the architecture, without its weights where they need not be fetched."""
        from transformers import AutoConfig

        if isinstance(self.source, Random | Synthetic | Outline):
            values = dict(self.source.config)
            return AutoConfig.for_model(values.pop("model_type"), **values)
        return AutoConfig.from_pretrained(
            self.source.folder(), local_files_only=True, trust_remote_code=False
        )

    def load(self, dtype: str, device: str) -> LM:
        """The model in eval mode with `dtype` weights on `device`, every parameter frozen, and its
        tokenizer.
        """
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        identity, kind = self.source.identity(), getattr(torch, dtype)
        if isinstance(self.source, Outline):
            from teq.random_model import architecture

            with torch.device("meta"):
                model = architecture(self.source.config)
            return LM(model.eval().requires_grad_(False), None, self.arch, identity)
        if isinstance(self.source, Random):
            from teq.random_model import build, byte_tokenizer

            model, tokenizer = build(self.source).to(kind), byte_tokenizer(self.source.bos)
        elif isinstance(self.source, Synthetic):
            from teq.random_model import byte_tokenizer, filled

            model, tokenizer = filled(self.source, kind, device), byte_tokenizer(bos=False)
        else:
            folder = self.source.folder()
            try:
                tokenizer = AutoTokenizer.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=False
                )
                model = AutoModelForCausalLM.from_pretrained(
                    folder, dtype=kind, use_safetensors=True, local_files_only=True, trust_remote_code=False
                )
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                raise UserError(
                    f"model={self.name} could not be loaded from {folder}: {_brief(error)}"
                ) from error
        model.eval().requires_grad_(False).to(device)
        return LM(model, tokenizer, self.arch, identity)


def file_digest(file: Path) -> str:
    """SHA-256 of a file, remembered by path, size and time for as long as the process lives."""
    status = file.stat()
    known = (str(file.resolve()), status.st_size, status.st_mtime_ns)
    if known not in _digests:
        with file.open("rb") as stream:
            _digests[known] = hashlib.file_digest(stream, "sha256").hexdigest()
    return _digests[known]


_digests: dict[tuple[str, int, int], str] = {}


def _complete(folder: Path) -> bool:
    """Whether a snapshot holds its weights, all shards of them."""
    import json

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return all(
            (folder / shard).is_file() for shard in set(json.loads(index.read_text())["weight_map"].values())
        )
    return any(folder.glob(WEIGHTS))


def _brief(error: BaseException) -> str:
    """An error in one line."""
    lines = (str(error) or type(error).__name__).splitlines()
    return " ".join(line.strip() for line in lines if line.strip())[:200]
