"""A request fails before the watchdog acts, and the watchdog acts before the process group gives up."""

import pytest

from trainer.distributed.world import collective_timeout_s
from trainer.sampling.served import request_timeout_s


@pytest.mark.parametrize("hang_timeout_s", [10.0, 1800.0, 7200.0, 86_400.0])
def test_timeouts_stand_in_order(hang_timeout_s):
    assert request_timeout_s(hang_timeout_s) < hang_timeout_s < collective_timeout_s(hang_timeout_s)
