"""Checkpoints: where they come from, what identifies them, and how they become a model with its tokenizer."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teq.files.digests import file_digests
from teq.models.arch import Arch
from teq.models.hub import WEIGHTS, Hub, brief
from teq.spec import Settings, UserError, digest, option

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


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
class Folder(Settings):
    """A checkpoint in a local folder, in the layout of `save_pretrained`."""

    path: str

    def plain(self) -> dict[str, Any]:
        """The folder's own name alone: where it lies changes no result and is nobody else's business."""
        return super().plain() | {"path": self.folder_path().name}

    def folder_path(self) -> Path:
        """The absolute path of the folder."""
        return Path(self.path).expanduser().absolute()

    def identity(self) -> str:
        """Digest over the configuration, the tokenizer and the weights: moving the folder changes nothing."""
        folder = self.folder()
        found = [f for f in folder.iterdir() if f.suffix in (".safetensors", ".json", ".model", ".txt")]
        return "sha256:" + digest(file_digests(folder, found))

    def folder(self) -> Path:
        """The folder itself. Raises UserError when it is missing or incomplete."""
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
        from teq.models.wheel import converted

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
    machine that holds it; never quality. `teq.models.synthetic.fill` gives the distribution. A CPU's weights
    differ from a GPU's: `Checkpoint.identity` tells them apart.
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

    def identity(self, device: str) -> str:
        """Return what identifies the weights; for synthetic ones drawn on a GPU, with the device type."""
        kind, found = device.partition(":")[0], self.source.identity()
        return f"{found}.{kind}" if isinstance(self.source, Synthetic) and kind != "cpu" else found

    def load(self, dtype: str, device: str, drawn_on: str | None = None) -> LM:
        """The model in eval mode with `dtype` weights on `device`, every parameter frozen, and its
        tokenizer.

        Synthetic weights are drawn on the device `drawn_on` (the same if not given), which decides their
        values.
        """
        import torch
        from transformers import AutoModelForCausalLM

        _quiet()
        identity, kind = self.identity(drawn_on or device), getattr(torch, dtype)
        if isinstance(self.source, Outline):
            from teq.models.synthetic import architecture

            with torch.device("meta"):
                model = architecture(self.source.config)
            return LM(model.eval().requires_grad_(False), None, self.arch, identity)
        tokenizer = self.tokenizer()
        if isinstance(self.source, Random):
            from teq.models.synthetic import build

            model = build(self.source).to(kind)
        elif isinstance(self.source, Synthetic):
            from teq.models.synthetic import filled

            model = filled(self.source, kind, device, drawn_on or device)
        else:
            folder = self.source.folder()
            with self._loading(folder):
                model, loading = AutoModelForCausalLM.from_pretrained(
                    folder,
                    dtype=kind,
                    use_safetensors=True,
                    local_files_only=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                )
            if absent := sorted(loading["missing_keys"]):
                raise UserError(
                    f"model={self.name}: {folder} lacks {len(absent)} of the model's tensors, {absent[0]} "
                    "first: transformers would make them up; give a folder that save_pretrained wrote of the "
                    "whole model"
                )
        model.eval().requires_grad_(False).to(device)
        return LM(model, tokenizer, self.arch, identity)

    def tokenizer(self) -> "PreTrainedTokenizerBase | None":
        """The tokenizer alone, the same object for as long as the process lives; None of a model without."""
        if isinstance(self.source, Outline):
            return None
        identity = self.source.identity()
        if identity not in _tokenizers:
            _tokenizers[identity] = self._tokenizer()
        return _tokenizers[identity]

    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        if isinstance(self.source, Random | Synthetic):
            from teq.models.synthetic import byte_tokenizer

            return byte_tokenizer(bos=isinstance(self.source, Random) and self.source.bos)
        from transformers import AutoTokenizer

        _quiet()
        folder = self.source.folder()
        with self._loading(folder):
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

    @contextlib.contextmanager
    def _loading(self, folder: Path) -> Iterator[None]:
        """Within: what transformers cannot make of a folder's files is a UserError."""
        from safetensors import SafetensorError

        try:
            yield
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise UserError(f"model={self.name} could not be loaded from {folder}: {brief(error)}") from error


def _quiet() -> None:
    """Keep transformers' own log and bars out of ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


_tokenizers: dict[str, "PreTrainedTokenizerBase"] = {}
