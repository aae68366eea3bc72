"""GGUF, llama.cpp's format: the types Q4_0, Q5_0 and Q8_0 are our symmetric grid in groups of 32, exactly.

One file, for llama architectures with a byte-level BPE tokenizer; tensors are written one by one.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teq.export.plan import Part, Plan
from teq.grid import Grid
from teq.quantizers.quantized import Quantized

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from torch import Tensor

NAME = "gguf"
MODULE = "gguf"
INSTALL = ("gguf>=0.17",)
FILE = "model.gguf"
GROUP = 32
TYPES = {4: "Q4_0", 5: "Q5_0", 8: "Q8_0"}
FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
SPLITTING = {  # llama.cpp's name of how a text is cut before BPE, by the tokenizer's own steps
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
}


def refusal(plan: Plan) -> str | None:
    """Return why the format cannot hold a model, or None."""
    sizes = plan.checkpoint.source.dimensions()
    if sizes.model_type != "llama":
        return f"gguf is written for llama architectures, this model is {sizes.model_type}"
    if plan.grid.bits not in TYPES or plan.grid.group_size != GROUP or not plan.grid.symmetric:
        return "gguf holds symmetric grids of 4, 5 or 8 bits in groups of 32 exactly, and no other"
    if plan.reordered:
        return "gguf holds no column order (g_idx), which act-order with groups needs"
    if sizes.attention_bias or sizes.mlp_bias:
        return "gguf is written for llama architectures without biases, this model has some"
    if (kind := sizes.rope_parameters["rope_type"]) != "default":
        return f"gguf is written for plain rotary positions, this model has rope_type={kind}"
    if _splitting(json.loads(plan.checkpoint.tokenizer().backend_tokenizer.to_str())) is None:
        return (
            "gguf is written for byte-level BPE tokenizers as GPT-2's and SmolLM's, this model's is another"
        )
    return None


def dtype(run: str) -> str:
    """Return the dtype of everything that is not quantized: the run's own."""
    return run if run in FLOATS else "float32"


def stored(plan: Plan) -> Grid:
    """Return the grid as stored: the run's."""
    return plan.grid


def write(plan: Plan, parts: Iterator[Part], folder: Path) -> Iterator[Part]:
    """Write the file to `folder`, which has the tokenizer's files; yield each part once it is written."""
    import gguf
    import numpy as np
    import torch

    sizes, types = plan.checkpoint.source.dimensions(), gguf.GGMLQuantizationType
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, sizes.num_hidden_layers)
    writer = gguf.GGUFWriter(folder / FILE, "llama")
    _add_dimensions(writer, plan)
    _add_tokenizer(writer, plan, folder)
    outline = plan.outline.state_dict()
    for name in (name for part in plan.names for name in part):
        tensor = outline[name]
        kind = types[TYPES[plan.grid.bits] if name.removesuffix(".weight") in plan.shapes else "F32"]
        if kind == types.F32 and tensor.ndim > 1:  # llama.cpp keeps norms in fp32
            kind = types[FLOATS[dtype(plan.dtype)]]
        numbers, size = gguf.GGML_QUANT_SIZES[kind]
        count = tensor.numel() // numbers * size
        theirs = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor_info(theirs, tensor.shape, np.dtype("float32"), count, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for names_of_part, part in zip(plan.names, parts, strict=True):
        for name in names_of_part:
            linear = part.linears.get(name.removesuffix(".weight"))
            if linear is None:
                value = part.others[name]
                value = value.to(torch.float32 if value.ndim == 1 else getattr(torch, dtype(plan.dtype)))
                data = value.contiguous().view(torch.uint8)
            else:
                data = paired(blocks_of(linear, plan.grid.bits), name, plan)
            writer.write_tensor_data(data.numpy())
        yield part
    writer.close()


def read(plan: Plan, folder: Path) -> Iterator[tuple[str, Quantized]]:
    """Yield the quantized linears by name that gguf's own reader finds in the file of a folder."""
    import gguf
    import torch

    blocks = plan.checkpoint.source.dimensions().num_hidden_layers
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, blocks)
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(folder / FILE).tensors}
    for name, shape in plan.shapes.items():
        data = torch.from_numpy(found[f"{names.get_name(name)}.weight"].copy()).view(shape[0], -1)
        yield name, linear_of(paired(data, f"{name}.weight", plan, back=True), plan.grid.bits)


def blocks_of(linear: Quantized, bits: int) -> "Tensor":
    """Return a linear's rows as bytes: a scale (fp16) and 32 codes for each group.

    Of 4 and 5 bits a byte holds the lower half of element i and of i + 16; the fifth bits come before them.
    """
    import torch

    codes = linear.codes.unflatten(1, (-1, GROUP))  # [out, groups, 32]
    parts = [linear.scale.to(torch.float16)[..., None].contiguous().view(torch.uint8)]
    if bits == 8:
        parts.append(codes - 128)  # wraps: signed
    else:
        if bits == 5:
            ones = (codes >> 4).unflatten(2, (-1, 8)) << torch.arange(8, dtype=torch.uint8)
            parts.append(ones.sum(-1, dtype=torch.uint8))
        parts.append((codes[..., :16] & 15) | (codes[..., 16:] << 4))
    return torch.cat(parts, -1).flatten(1)


def linear_of(rows: "Tensor", bits: int) -> Quantized:
    """Return the linear that rows of bytes hold, the inverse of `blocks_of`."""
    import torch

    block = rows.unflatten(1, (-1, 2 + GROUP * bits // 8))
    scale = block[..., :2].contiguous().view(torch.float16)[..., 0].float()
    if bits == 8:
        codes = block[..., 2:] + 128
    else:
        low = block[..., -16:]
        codes = torch.cat([low & 15, low >> 4], -1)
        if bits == 5:
            ones = (block[..., 2:6, None] >> torch.arange(8, dtype=torch.uint8)) & 1
            codes = codes | (ones.flatten(2) << 4)
    return Quantized(codes.flatten(1), scale, torch.full_like(scale, 2 ** (bits - 1)))


def paired(rows: "Tensor", name: str, plan: Plan, back: bool = False) -> "Tensor":
    """Return the rows of a query's or key's weight in llama.cpp's order, or `back` in transformers' order.

    A rotation turns the channels i and i + n/2 of a head in transformers, 2i and 2i + 1 in llama.cpp.
    """
    sizes = plan.checkpoint.source.dimensions()
    heads = {"q_proj": sizes.num_attention_heads, "k_proj": sizes.num_key_value_heads}.get(
        name.split(".")[-2]
    )
    if heads is None:
        return rows
    half = len(rows) // heads // 2
    parts = rows.unflatten(0, (heads, half, 2) if back else (heads, 2, half))
    return parts.transpose(1, 2).flatten(0, 2).contiguous()


def _add_dimensions(writer: "GGUFWriter", plan: Plan) -> None:
    """Add what llama.cpp reads of an architecture."""
    import gguf

    sizes = plan.checkpoint.source.dimensions()
    writer.add_name(plan.checkpoint.name)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{TYPES[plan.grid.bits]}"])
    writer.add_context_length(sizes.max_position_embeddings)
    writer.add_embedding_length(sizes.hidden_size)
    writer.add_block_count(sizes.num_hidden_layers)
    writer.add_feed_forward_length(sizes.intermediate_size)
    writer.add_head_count(sizes.num_attention_heads)
    writer.add_head_count_kv(sizes.num_key_value_heads)
    width = sizes.head_dim or sizes.hidden_size // sizes.num_attention_heads
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(sizes.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(sizes.rms_norm_eps)
    writer.add_vocab_size(sizes.vocab_size)


def _add_tokenizer(writer: "GGUFWriter", plan: Plan, folder: Path) -> None:
    """Add the vocabulary; special tokens, merges and chat template as gguf reads them from the folder."""
    import gguf

    tokenizer = plan.checkpoint.tokenizer()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {token["content"] for token in content["added_tokens"]}
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    count = plan.checkpoint.source.dimensions().vocab_size
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(count)]
    kinds = [
        gguf.TokenType.UNUSED
        if i not in by_id
        else gguf.TokenType.CONTROL
        if by_id[i] in special
        else gguf.TokenType.NORMAL
        for i in range(count)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_splitting(content))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=count).add_to_gguf(writer, quiet=True)


def _splitting(tokenizer: dict[str, Any]) -> str | None:
    """Return llama.cpp's name of how the tokenizer cuts a text before BPE, or None where it has none."""
    before = tokenizer.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    plain = tokenizer["model"]["type"] == "BPE" and not tokenizer.get("normalizer")
    kinds = tuple(step.get("type") for step in steps)
    known = plain and not any(step.get("add_prefix_space") for step in steps)
    return SPLITTING.get(kinds) if known else None
