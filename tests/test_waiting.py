"""Hidden states of a host with too little memory wait in a mapped file that nobody sees."""

import errno
import os
import pathlib
from unittest import mock

import pytest
import torch

from teq.device import host_memory, waiting
from teq.spec import UserError


@pytest.fixture
def full(monkeypatch, own_home):
    """A host that has 1000 bytes, and the folder where its files are."""
    monkeypatch.setattr(host_memory, "available", lambda: 1000)
    return own_home


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_does_not_fit_is_in_a_file_without_a_name(full, dtype):
    mapped = waiting.room((3, 5, 50), dtype)
    mapped.copy_(torch.arange(750).view(3, 5, 50))
    assert mapped.dtype == dtype and mapped.flatten().tolist() == torch.arange(750).to(dtype).tolist()
    assert list(full.iterdir()) == []
    assert f"{full}/" in pathlib.Path("/proc/self/maps").read_text()


def test_what_is_put_into_places_is_copied_and_copies_are_their_own(full):
    first = torch.ones(1, 4, 50)
    places = waiting.places("cpu", 3, first)
    assert isinstance(places, waiting.InFile)
    addresses = [place.data_ptr() for place in places]
    for index in range(3):
        places[index] = first * index
    assert [place.data_ptr() for place in places] == addresses
    others = places.copy()
    places[0] = first * 7
    first.zero_()
    assert [place.mean().item() for place in places] == [7, 1, 2]
    assert [place.mean().item() for place in others] == [0, 1, 2]
    assert places.pop(0).shape == (1, 4, 50) and len(places) == 2


def test_what_fits_or_is_on_another_device_waits_where_it_is(full):
    assert type(waiting.places("cpu", 1, torch.ones(100))) is list
    assert type(waiting.places("meta", 100, torch.ones(100))) is list


def test_a_full_disk_is_said_before_the_work(full):
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (
        mock.patch.object(os, "posix_fallocate", side_effect=error),
        pytest.raises(
            UserError, match=r"no room in the host's memory, nor in .* \(No space left on device\)"
        ),
    ):
        waiting.room((10**6,), torch.float32)
    assert list(full.iterdir()) == []
