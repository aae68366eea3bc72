"""Checkpoints in folders, in the layout of `save_pretrained`."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from teq.files.digests import file_digests
from teq.files.disk import one_line
from teq.spec import Settings, UserError, digest

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS = "*.safetensors"


@dataclass(frozen=True, kw_only=True)
class Saved(Settings):
    """A source of models whose files lie in `folder()`; safetensors only, no remote code."""

    at_hand: ClassVar[bool] = False  # whether its dimensions are known without fetching files

    def folder(self) -> Path:
        """Return the folder, fetched where it is missing."""
        raise NotImplementedError

    def dimensions(self) -> "PretrainedConfig":
        """Return the dimensions of the architecture."""
        return dimensions_in(self.folder())

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Load the tokenizer. Raises UserError where its files cannot be read."""
        from transformers import AutoTokenizer

        folder = self.folder()
        with _loading(folder):
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

    def model(self, dtype: str, device: str, drawn_on: str) -> "PreTrainedModel":
        """Load the model. Raises UserError where tensors are missing or files cannot be read."""
        import torch
        from transformers import AutoModelForCausalLM

        from teq.models.layers import with_linears

        folder = self.folder()
        with _loading(folder):
            model, loading = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        if absent := sorted(loading["missing_keys"]):
            raise UserError(
                f"{folder} lacks {len(absent)} of the model's tensors, {absent[0]} first: transformers would "
                "make them up; give a folder that save_pretrained wrote of the whole model"
            )
        return with_linears(model).to(device)

    def tensors(self, dtype: str) -> "Mapping[str, Tensor]":
        """Return the tensors by the model's names, each read when it is asked for; see `SavedTensors`."""
        return SavedTensors(self.folder(), dtype, self.dimensions())

    def generation(self) -> "GenerationConfig":
        """Return how the model generates: the folder's file, or what its configuration implies."""
        from transformers import GenerationConfig

        if (self.folder() / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(self.folder(), local_files_only=True)
        return GenerationConfig.from_model_config(self.dimensions())


class SavedTensors(Mapping[str, "Tensor"]):
    """The tensors of a folder's safetensors in one dtype, read one by one.

    One in the file's own dtype is a private mapping of the file: it takes no memory until it is written to.
    Names are the model's: where transformers renames what a checkpoint holds, so does this. A checkpoint of
    the model without its head names them without the model's prefix, such as `transformer.`.
    """

    def __init__(self, folder: Path, dtype: str, dimensions: "PretrainedConfig") -> None:
        from safetensors import safe_open
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, apply_renamings

        self.folder, self.dtype = folder, dtype
        known = (*(dimensions.architectures or ()), dimensions.model_type)
        found = next((rules for name in known if (rules := get_checkpoint_conversion_mapping(name))), [])
        renamings = [rule for rule in found if isinstance(rule, WeightRenaming)]
        self.stored: dict[str, tuple[Path, str]] = {}  # file and name in it of each tensor
        for path in sorted(folder.glob(WEIGHTS)):
            with safe_open(path, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118  (it is no mapping)
                    self.stored[apply_renamings(key, renamings)] = path, key

    def __getitem__(self, name: str) -> "Tensor":
        """Return a tensor. Raises UserError where there is none of that name."""
        import torch
        from safetensors import safe_open

        found = self.stored.get(name) or self.stored.get(name.partition(".")[2])
        if found is None:
            raise UserError(f"{self.folder} lacks {name}: give a folder that save_pretrained wrote")
        file, key = found
        with safe_open(file, "pt") as opened:  # anew: what is written to a tensor stays with it alone
            tensor = opened.get_tensor(key)
        return tensor.to(getattr(torch, self.dtype)) if tensor.is_floating_point() else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


@dataclass(frozen=True, kw_only=True)
class Folder(Saved):
    """A checkpoint in a local folder."""

    at_hand = True
    path: str

    def plain(self) -> dict[str, Any]:
        """Return the folder's own name alone: where it lies changes no result."""
        return super().plain() | {"path": self.folder_path().name}

    def folder_path(self) -> Path:
        """Return the absolute path of the folder."""
        return Path(self.path).expanduser().absolute()

    def fingerprint(self, device: str = "cpu") -> str:
        """Return a digest of configuration, tokenizer and weights, the same wherever the folder lies."""
        folder = self.folder()
        found = [f for f in folder.iterdir() if f.suffix in (".safetensors", ".json", ".model", ".txt")]
        return "sha256:" + digest(file_digests(folder, found))

    def folder(self) -> Path:
        """Return the folder itself. Raises UserError when it is missing or incomplete."""
        folder = self.folder_path()
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


def dimensions_in(folder: Path) -> "PretrainedConfig":
    """Return the dimensions in a folder's config.json. Raises UserError where transformers knows no such."""
    from transformers import AutoConfig

    with _loading(folder):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


@contextlib.contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """Context manager: convert transformers' loading errors to UserError, keep its log and bars quiet."""
    from safetensors import SafetensorError
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"the model could not be loaded from {folder}: {one_line(error)}") from error
