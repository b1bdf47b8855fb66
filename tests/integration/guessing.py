"""An environment whose answers depend on its seed and the turns; it can be told to wait or to die."""

from __future__ import annotations

import os
import time
from pathlib import Path

from trainer.environments.contract import Observation, Start, Turn
from trainer.types import Row


class Echo:
    """Rewards long answers; ends after a number of turns that depends on the seed."""

    def reset(self, row: Row, *, seed: int) -> Start:
        """Ask the row's question."""
        self.turns_left = 1 + seed % 3
        self.row = row
        return Start([{"role": "user", "content": row["ask"]}])

    def step(self, turn: Turn) -> Observation:
        """Say how long the answer was; wait where a file of this name says so."""
        while Path("wait").exists():
            Path("waiting").touch()
            time.sleep(0.05)
        if Path("die").exists() and self.row["ask"] == Path("die").read_text():
            os._exit(7)
        self.turns_left -= 1
        reward = float(len(turn.text) % 7)
        messages = [{"role": "user", "content": f"You wrote {len(turn.text)}."}]
        return Observation([] if self.turns_left == 0 else messages, done=self.turns_left == 0, reward=reward)


def double(number: int) -> int:
    """Double a number."""
    return 2 * number
