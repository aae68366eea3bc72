"""Devices by name."""

import pytest

from teq.device.runtime import resolve
from teq.spec import UserError


def test_unknown_device_is_refused():
    for device in ("cuda:9", "tpu", "mps"):
        with pytest.raises(UserError, match=f"device={device}"):
            resolve(device)
