"""The price table: what tokens and device-hours cost, in a unit of the operator's own."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Final, final

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer.errors import UserError

NANO: Final = 10**9
"""Amounts are integers of 1e-9 units, so that sums are exact."""
Price = Annotated[Decimal, Field(ge=0, max_digits=18, decimal_places=3)]


@final
class PriceError(UserError):
    """A price table that cannot be used."""


@final
class ModelPrice(BaseModel):
    """Price of a million tokens of one model."""

    model_config = ConfigDict(extra="forbid")

    input: Price = Decimal(0)
    output: Price = Decimal(0)

    def cost(self, prompt_tokens: int, completion_tokens: int) -> int:
        """In 1e-9 units: a price of 1 per million tokens is 1,000 of them per token."""
        return int((self.input * prompt_tokens + self.output * completion_tokens) * 1000)


@final
class Prices(BaseModel):
    """A price table, as YAML."""

    model_config = ConfigDict(extra="forbid")

    unit: str = "credits"
    """Name of the unit, for people."""
    models: dict[str, ModelPrice] = {}
    """By name of the model; `*` is any other."""
    device_hour: dict[str, Price] = {}
    """Of a deployment's replicas, by device name of the shape; `*` is any other."""

    def of_model(self, model: str) -> ModelPrice:
        """The price of a model; nothing where the table names neither it nor `*`."""
        return self.models.get(model) or self.models.get("*") or ModelPrice()

    def device_cost(self, device: str, seconds: float) -> int:
        """What a device costs for some seconds, in 1e-9 units."""
        price = self.device_hour.get(device, self.device_hour.get("*", Decimal(0)))
        return int(price * Decimal(seconds) / 3600 * NANO)


def read_prices(file: str | None) -> Prices:
    """Read a table; without a file everything is free.

    Raises:
        PriceError: the file cannot be read, or a value is no price.
    """
    if file is None:
        return Prices()
    try:
        raw = yaml.load(Path(file).read_text(encoding="utf-8"), Loader=_Exact)
        return Prices.model_validate(raw if isinstance(raw, Mapping) else {"prices": raw})
    except (OSError, UnicodeDecodeError) as error:
        raise PriceError(f"--prices {file}: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 1
        raise PriceError(f"{file}:{line}: {error.problem}") from None
    except ValidationError as error:
        raise PriceError(
            "\n".join(f"{file}: {'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        ) from None


class _Exact(yaml.SafeLoader):
    """Reads 0.1 as the decimal number that was written."""


_Exact.add_constructor("tag:yaml.org,2002:float", lambda _loader, node: Decimal(str(node.value).replace("_", "")))


def amount(nano: int) -> str:
    """An amount for people.

    >>> amount(1_500_000_000), amount(-1), amount(0)
    ('1.5', '-0.000000001', '0')
    """
    text = f"{Decimal(nano) / NANO:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
