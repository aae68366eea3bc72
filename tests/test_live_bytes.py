"""Bytes of live tensors."""

import torch

from teq.device.live_bytes import LiveBytes


def test_live_bytes_counts_a_storage_once_and_only_while_it_lives():
    given = torch.ones(1000)
    with LiveBytes() as live:
        view = (given * 2)[:500]  # 4000 bytes, kept alive by a view
        given.add_(1)
        torch.exp(view)  # 2000 bytes more, at once gone
    assert (live.live, live.peak) == (4000, 6000)
    del view
    assert live.live == 0
