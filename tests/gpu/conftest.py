"""Each test of this folder that asks for a device runs on both."""

import pytest

from tests.support.devices import DEVICES


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param
