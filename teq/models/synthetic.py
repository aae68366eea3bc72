"""Models made in memory: architectures, seeded random weights, and a byte-level tokenizer."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from teq.spec import Settings, option

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True)
class _InMemory(Settings):
    """A source of models that are made in memory from the dimensions `config`: nothing to fetch."""

    at_hand: ClassVar[bool] = True
    bos: ClassVar[bool] = False
    config: dict[str, Any]

    def fingerprint(self, device: str = "cpu") -> str:
        """Return the settings' key: they determine the weights."""
        return f"{type(self).__name__.lower()}:{self.key()}"

    def dimensions(self) -> "PretrainedConfig":
        """Return the dimensions of the architecture."""
        from transformers import AutoConfig

        values = dict(self.config)
        return AutoConfig.for_model(values.pop("model_type"), **values)

    def tokenizer(self) -> "PreTrainedTokenizerFast | None":
        """Return the byte tokenizer, with or without a token at the beginning."""
        return byte_tokenizer(bos=self.bos)

    def tensors(self, dtype: str) -> "Mapping[str, Tensor]":
        """Return the model's tensors by name, all in memory."""
        return self.model(dtype, "cpu", "cpu").state_dict()

    def generation(self) -> "GenerationConfig":
        """Return how the model generates, as its dimensions imply."""
        from transformers import GenerationConfig

        return GenerationConfig.from_model_config(self.dimensions())


@dataclass(frozen=True, kw_only=True)
class Random(_InMemory):
    """A small model with seeded random weights, the same on every machine."""

    seed: int = option(0, at_least=0)
    bos: bool = True

    def model(self, dtype: str, device: str, drawn_on: str) -> "PreTrainedModel":
        """Draw the weights on the CPU in fp32."""
        import torch

        return build(self).to(getattr(torch, dtype)).to(device)


@dataclass(frozen=True, kw_only=True)
class Synthetic(_InMemory):
    """An architecture of true size with seeded random weights (see `fill`), to measure time and memory.

    Never quality. A CPU's weights differ from a GPU's, and so do their fingerprints.
    """

    seed: int = option(0, at_least=0)

    def fingerprint(self, device: str = "cpu") -> str:
        """Return the settings' key, with the type of the device that the weights are drawn on if a GPU."""
        kind = device.partition(":")[0]
        return super().fingerprint() + ("" if kind == "cpu" else f".{kind}")

    def model(self, dtype: str, device: str, drawn_on: str) -> "PreTrainedModel":
        """Fill the weights on `device` with numbers from the device `drawn_on`.

        Parameters are filled one after another, so that nothing else of their size is held.
        """
        import torch
        from transformers.initialization import no_init_weights

        with torch.device(device), no_init_weights():
            model = architecture(self.dimensions(), dtype)
        model.tie_weights()
        generator = torch.Generator(drawn_on).manual_seed(self.seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                drawn = torch.empty_like(parameter, device=drawn_on) if drawn_on != device else parameter
                fill(drawn, name.endswith("bias"), generator)
                parameter.copy_(drawn)
        return model


@dataclass(frozen=True, kw_only=True)
class Outline(_InMemory):
    """An architecture on PyTorch's meta device, for counting: no weights, no tokenizer, no computation."""

    def tokenizer(self) -> None:
        """Return None: there is no tokenizer."""

    def model(self, dtype: str, device: str, drawn_on: str) -> "PreTrainedModel":
        """Make the modules; nothing is allocated, whatever the size."""
        import torch

        with torch.device("meta"):
            return architecture(self.dimensions())


def build(settings: Random) -> "PreTrainedModel":
    """Return a causal LM in fp32 with random norms and non-zero biases, the same for the same seed."""
    import torch

    model = architecture(settings.dimensions())
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(torch.exp(0.3 * noise))
    return model


SPREAD = 0.3  # standard deviation of the logarithm of a row's and of a channel's size
OUTLIERS = 128  # one channel in so many is an outlier
OUTLIER = 4.0  # how many times larger it is


def fill(parameter: "Tensor", bias: bool, generator: "torch.Generator") -> None:
    """Fill a parameter with random values, on its device and in its dtype.

    A matrix `[out, in]` is `in ** -0.5 * a * b * n`: n standard normal for every weight, a for every row and
    b for every input channel log-normal with `SPREAD`, b of one channel in `OUTLIERS` (at least one)
    `OUTLIER` times larger. So weights are heavy-tailed (a normal's kurtosis of 3 times exp(8 SPREAD^2), about
    6, and about 15 with the outliers) and some channels stand out, as in real models. A norm's weight is
    drawn like b, which gives the activations outlier channels; a bias is 0.1 n.
    """
    import torch

    def sizes(count: int) -> "Tensor":
        noise = torch.empty(count, device=parameter.device).normal_(std=SPREAD, generator=generator)
        return noise.exp_()

    channels = parameter.shape[-1]
    if bias:
        parameter.normal_(std=0.1, generator=generator)
        return
    b = sizes(channels)
    outliers = torch.randperm(channels, device=parameter.device, generator=generator)
    b[outliers[: math.ceil(channels / OUTLIERS)]] *= OUTLIER
    if parameter.ndim == 1:
        parameter.copy_(b)
    else:
        parameter.normal_(std=channels**-0.5, generator=generator)
        parameter.mul_(b.to(parameter.dtype)).mul_(sizes(len(parameter))[:, None].to(parameter.dtype))


def skeleton(dimensions: "PretrainedConfig") -> "PreTrainedModel":
    """Return the causal LM of these dimensions on PyTorch's meta device, tied as a loaded one is."""
    import torch

    with torch.device("meta"):
        model = architecture(dimensions)
    model.tie_weights()
    return model


def architecture(dimensions: "PretrainedConfig", dtype: str | None = None) -> "PreTrainedModel":
    """Return the causal LM of these dimensions as transformers makes it, on the default device.

    Only its Conv1D layers and fused experts are linears instead.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from teq.models.layers import with_linears

    return with_linears(AutoModelForCausalLM.from_config(dimensions, dtype=dtype and getattr(torch, dtype)))


def byte_tokenizer(bos: bool) -> "PreTrainedTokenizerFast":
    """Return a tokenizer of one token per byte (ids 2 to 257), `<s>` 0 first where `bos`, `</s>` 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {
        token: i for i, token in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
