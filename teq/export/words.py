"""Codes as rows of 32-bit words: each row is a dense little-endian bit stream."""

from typing import TYPE_CHECKING

from teq.grid import pack, unpack

if TYPE_CHECKING:
    from torch import Tensor


def words(codes: "Tensor", bits: int) -> "Tensor":
    """Return codes `[rows, n]` as int32 `[rows, ceil(n * bits / 32)]`."""
    import torch

    filled = torch.nn.functional.pad(codes.to(torch.uint8), (0, -codes.shape[1] % 32))
    packed = pack(filled, bits).view(torch.int32).view(len(codes), -1)
    return packed[:, : -(-codes.shape[1] * bits // 32)].contiguous()


def codes_of(packed: "Tensor", bits: int, columns: int) -> "Tensor":
    """Return the inverse of `words`: codes `[rows, columns]`, uint8."""
    import torch

    filled = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits)).contiguous()  # whole groups of 32
    count = filled.shape[1] * 32 // bits
    return unpack(filled.view(torch.uint8).flatten(), bits, (len(packed), count))[:, :columns].contiguous()
