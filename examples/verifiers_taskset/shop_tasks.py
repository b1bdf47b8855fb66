"""A taskset in the form of verifiers 0.4: what a shopping list costs; a tool server knows the prices."""

import re

import verifiers.v1 as vf

PRICES = {"pen": 3, "book": 12, "lamp": 25, "cup": 7, "bag": 18, "ball": 9}
NUM_TASKS = 24


class ShopData(vf.TaskData):
    """One shopping list."""

    total: int


class PriceTools(vf.Toolset[vf.ToolsetConfig]):
    """The tool server of a rollout."""

    TOOL_PREFIX = "shop"

    @vf.tool
    async def price(self, item: str) -> int:
        """The price of one item, such as `pen`."""
        return PRICES[item]


class ShopTaskConfig(vf.TaskConfig):
    """How the tool server is run."""

    tools: vf.ToolsetConfig = vf.ToolsetConfig()


class ShopTask(vf.Task[ShopData, vf.State, ShopTaskConfig]):
    """Asks for the total of two kinds of things."""

    @classmethod
    def toolsets(cls, config: ShopTaskConfig) -> list[vf.Toolset]:
        """Run one server of prices."""
        return [PriceTools(config.tools)]

    @vf.reward
    async def right_total(self, trace: vf.Trace) -> float:
        """1 if the last number of the last answer is the total."""
        numbers = re.findall(r"\d+", trace.last_reply or "")
        return float(bool(numbers) and int(numbers[-1]) == self.data.total)

    @vf.reward(weight=0.1)
    async def asked(self, trace: vf.Trace) -> float:
        """1 if the price tool was used."""
        return float(len(trace.tool_messages) > 0)


class ShopConfig(vf.TasksetConfig):
    """Settings of the taskset."""

    task: ShopTaskConfig = ShopTaskConfig()


class Shop(vf.Taskset[ShopTask, ShopConfig]):
    """Lists of two kinds of things, the same every time."""

    def load(self) -> list[ShopTask]:
        """Make all tasks."""
        items, tasks = list(PRICES), []
        for number in range(NUM_TASKS):
            first, second = items[number % len(items)], items[(number // len(items) + number + 1) % len(items)]
            few, more = 1 + number % 3, 2 + number % 4
            prompt = f"What do {few} x {first} and {more} x {second} cost together? Ask for the prices first."
            total = few * PRICES[first] + more * PRICES[second]
            tasks.append(ShopTask(ShopData(prompt=prompt, total=total), self.config.task))
        return tasks


__all__ = ["Shop"]

if __name__ == "__main__":
    PriceTools.run()
