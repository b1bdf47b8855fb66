"""A support desk that can look things up: two tools over the orders of a row, and a reward for the right answer."""

from __future__ import annotations

from trainer.environments.contract import Observation, Start, Turn
from trainer.types import Row

RULE = "You are the support desk of a shop. Look up what you need, then answer with one word or number."


class Desk:
    """One conversation: the customer asks, the policy calls tools, its first turn without a call is the answer."""

    def reset(self, row: Row, *, seed: int) -> Start:
        """Ask the row's question."""
        self.orders, self.answer, self.num_look_ups = row["orders"], str(row["answer"]), 0
        messages = [{"role": "system", "content": RULE}, {"role": "user", "content": row["question"]}]
        return Start(messages, tools=[self.find_order, self.list_orders])

    def find_order(self, number: int) -> dict[str, str]:
        """Look up item, city and status of an order."""
        self.num_look_ups += 1
        return self.orders.get(str(number), {"error": "no such order"})

    def list_orders(self, customer: str) -> list[str]:
        """List the numbers of a customer's orders."""
        self.num_look_ups += 1
        return [number for number, order in self.orders.items() if order["customer"].lower() == customer.lower()]

    def step(self, turn: Turn) -> Observation:
        """Judge the answer, the first turn without a call: 1 if it has the right word."""
        words = turn.text.lower().replace(".", " ").replace(",", " ").split()
        parts = {"looked_up": float(self.num_look_ups > 0), "right": float(self.answer.lower() in words)}
        return Observation([], done=True, reward=parts["right"], parts=parts)
