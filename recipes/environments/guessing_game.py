"""The policy guesses a number; after each wrong guess it is told whether the number is higher or lower."""

from __future__ import annotations

import re

from trainer.environments.contract import Observation, Start, Turn
from trainer.types import Row


class GuessingGame:
    """One game. Its reward is 1 for a right guess and 0 for a game that is lost."""

    def reset(self, row: Row, *, seed: int) -> Start:
        """Ask the row's question; the answer is in the row, or drawn from the seed."""
        low, high = row["low"], row["high"]
        self.secret = row.get("answer", low + seed % (high - low + 1))
        self.guesses_left = row["guesses"]
        rule = {"role": "system", "content": "Answer with one number."}
        return Start([rule, {"role": "user", "content": row["question"]}])

    def step(self, turn: Turn) -> Observation:
        """Compare the guess with the secret."""
        self.guesses_left -= 1
        guess = re.fullmatch(r"\s*(\d+)\.?\s*", turn.text)
        parts = {"is_number": 1.0 if guess else 0.0}
        if guess and int(guess[1]) == self.secret:
            return Observation([], done=True, reward=1.0, parts=parts)
        if self.guesses_left == 0:
            return Observation([], done=True, reward=0.0, parts=parts)
        hint = "Not a number." if not guess else "Higher." if int(guess[1]) < self.secret else "Lower."
        return Observation([{"role": "user", "content": hint}], done=False, parts=parts)
