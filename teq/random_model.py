"""Models made in memory: architectures, seeded random weights, and a byte-level tokenizer."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from teq.models import Random

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def build(settings: Random) -> "PreTrainedModel":
    """A causal LM of `settings.config` in fp32 with random norms and non-zero biases, the same for the
    same seed.
    """
    import torch

    model = architecture(settings.config)
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


def architecture(config: Mapping[str, Any]) -> "PreTrainedModel":
    """The causal LM of `model_type` and its dimensions as transformers makes it, on the default device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(config)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))


def byte_tokenizer(bos: bool) -> "PreTrainedTokenizerFast":
    """One token per byte (ids 2 to 257), `<s>` 0 in front of every text where `bos`, `</s>` 1."""
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
