"""Extraction rows: a sentence about an order, a booking or a ticket, and its JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from datasets_random import Draws
from datasets_templates import CLOSERS, FAMILIES, OPENERS

SYSTEM: Final = "Turn the sentence into JSON."
NUM_ROWS: Final = {"train": 1080, "heldout": 210}

KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "order": ("item", "quantity", "customer", "city"),
    "booking": ("name", "date", "time", "people"),
    "ticket": ("passenger", "from", "to", "price"),
}
NUMBERS: Final = frozenset({"quantity", "people", "price"})
CASES: Final[tuple[Callable[[str], str], ...]] = (str,) * 20 + (str.lower,) * 3 + (str.upper,)
"""Case of a whole sentence: mostly unchanged."""

# Each pair: values of both splits, then values that only held-out rows use.
FIRST: Final = (
    "Anna Ben Carla David Emma Felix Grace Hugo Ivan Julia Karl Laura Maria Nina Oscar Paul Rosa Sam Tom Vera Amir Mei "
    "Omar Priya Yuki Lucas Sofia Peter Helen Mark Diana Leo Alice George Sarah Adam Bella Caleb Dmitri Elena Farid "
    "Gwen Hassan Ingrid Joao Kenji Lila Mateo Nadia Otto Pablo Quentin Rachel Stefan Theresa Ulrich Wendy Xavier "
    "Yasmin Zoe Abigail Bjorn Chloe Dennis Esther Francesca",
    "Bruno Clara Erik Fatima Gloria Henry Irene Jack Lena Martin Olga Victor",
)
LAST: Final = (
    "Smith Brown Novak Garcia Miller Lopez Khan Weber Rossi Jensen Park Silva Cohen Murphy Tanaka Clark Young Baker "
    "Walker Green King Hill Scott Adams Fischer Ali Chen Singh Kowalski Okafor Petrov Nguyen Lindqvist Moreau Haddad "
    "Ferreira Yamamoto Schneider Papadopoulos Bianchi Ivanova Delgado Osborne Whitaker Mbeki Sato Keller Dubois",
    "Turner Cook Bell Ward Gray Lee Wood Ross Hansen Costa",
)
CITY: Final = (
    "Paris|London|Berlin|Rome|Madrid|Oslo|Vienna|Prague|Lisbon|Dublin|Athens|Warsaw|Boston|Chicago|Denver|Seattle|"
    "Toronto|Sydney|Tokyo|Delhi|Cairo|Milan|Munich|Geneva|New York|San Diego|Hamburg|Brussels|Austin|Dallas|Krakow|"
    "Zurich|Valencia|Bilbao|Porto|Naples|Turin|Venice|Bologna|Marseille|Bordeaux|Lille|Toulouse|Antwerp|Rotterdam|"
    "Utrecht|Seville|Cologne|Stuttgart|Leipzig|Dresden|Bremen|Salzburg|Graz|Basel|Lausanne|Copenhagen|Aarhus|"
    "Gothenburg|Malmo|Bergen|Helsinki|Tampere|Riga|Tallinn|Vilnius|Gdansk|Budapest|Bucharest|Sofia|Belgrade|Zagreb|"
    "Ljubljana|Istanbul|Ankara|Beirut|Casablanca|Nairobi|Lagos|Accra|Johannesburg|Cape Town|Karachi|Bangkok|Hanoi|"
    "Manila|Seoul|Osaka|Kyoto|Perth|Brisbane|Auckland|Lima|Bogota|Santiago|Havana|Vancouver|Ottawa|Calgary|Houston|Phoenix|"
    "Portland|Detroit|Memphis|Baltimore|San Jose|Salt Lake City|Manchester|Liverpool|Edinburgh|Glasgow|Cardiff",
    "Florence|Barcelona|Stockholm|Atlanta|Miami|Montreal|Melbourne|Mumbai|Los Angeles|Nice",
)
NOUN: Final = (
    "chairs|desks|lamps|shirts|books|pens|mugs|plates|bottles|boxes|bags|cables|phones|tables|shoes|towels|candles|"
    "cups|jackets|batteries|keyboards|blankets|notebooks|bikes|helmets|mirrors|printers|knives|hats|clocks|shelves|"
    "carpets|curtains|envelopes|folders|markers|staplers|headphones|routers|monitors|hammers|ladders|brushes|buckets|"
    "filters|magnets|postcards|puzzles|ribbons|sandals|sweaters|teapots|trays|vases|wallets|whistles|zippers|radios",
    "pillows|spoons|scarves|speakers|tents|umbrellas|gloves|baskets|cameras|screws",
)
ADJECTIVE: Final = (
    "red|blue|green|black|white|small|large|wooden|cheap|heavy|used|glass|steel|soft|office|garden|kitchen|leather|"
    "orange|purple|thin|waterproof|striped|silver|travel|paper|antique|rubber",
    "yellow|plastic|cotton|metal|round|folding",
)
DAYS: Final = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS: Final = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)


def make_extract_rows(split: str, draws: Draws) -> list[dict[str, Any]]:
    """Return the rows of one split; families of a kind alternate, so that each is used."""
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    patterns = [(kind, FAMILIES[kind][split].strip().splitlines()) for kind in KEYS]
    turn = 0
    while len(rows) < NUM_ROWS[split]:
        kind, families = patterns[turn % len(patterns)]
        number = turn // len(patterns) % len(families)
        turn += 1
        text, answer = write_sentence(families[number], kind, split, draws)
        if text.lower() in seen:
            continue
        seen.add(text.lower())
        rows.append(
            {
                "messages": [
                    {"role": "system", "content": SYSTEM},
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": json.dumps(answer, separators=(",", ":"))},
                ],
                "family": f"{kind}-{split}-{number + 1:02d}",
            }
        )
    return draws.shuffled(rows)


def write_sentence(pattern: str, kind: str, split: str, draws: Draws) -> tuple[str, dict[str, Any]]:
    """Fill one pattern and return the sentence and its answer, the values as written in it."""
    values = {key: draw_value(key, split, draws) for key in KEYS[kind]}
    while kind == "ticket" and values["from"] == values["to"]:
        values["to"] = draw_value("to", split, draws)
    opener = draws.pick(OPENERS[split]) if draws.chance(0.2) else ""
    closer = draws.pick(CLOSERS[split]) if draws.chance(0.3) else ""
    pattern = opener + re.sub(r"\[(.*?)\]", lambda match: draws.pick(match[1].split("|")), pattern) + closer
    text = pattern.format(**values, digits=draws.between(1000, 9999))
    if text[0].islower() and draws.chance(0.5):
        text = text[0].upper() + text[1:]
    change = draws.pick(CASES)
    text = change(text)
    written = {key: change(value) for key, value in values.items()}
    for key, value in written.items():
        if value not in text:  # it starts the sentence and was capitalized
            written[key] = value[0].upper() + value[1:]
    return text, {key: json.loads(value) if key in NUMBERS else value for key, value in written.items()}


def draw_value(key: str, split: str, draws: Draws) -> str:
    """Return the text of one value."""
    if key in ("customer", "name", "passenger"):
        first = draws.pick(pool(FIRST, split, None, draws))
        return first if draws.chance(0.4) else f"{first} {draws.pick(pool(LAST, split, None, draws))}"
    if key in ("city", "from", "to"):
        return draws.pick(pool(CITY, split, "|", draws))
    if key == "item":
        noun = draws.pick(pool(NOUN, split, "|", draws))
        return noun if draws.chance(0.4) else f"{draws.pick(pool(ADJECTIVE, split, '|', draws))} {noun}"
    draw = {"quantity": draw_quantity, "people": draw_people, "price": draw_price, "date": draw_date, "time": draw_time}
    return draw[key](draws)


def pool(pair: tuple[str, str], split: str, separator: str | None, draws: Draws) -> list[str]:
    """Return the values to draw from: a third of the held-out draws use values that never occur in training."""
    known, unseen = (part.split(separator) for part in pair)
    return unseen if split == "heldout" and draws.chance(1 / 3) else known


def draw_quantity(draws: Draws) -> str:
    """Return a small or a round quantity."""
    return str(draws.between(2, 60) if draws.chance(0.8) else 10 * draws.between(7, 50))


def draw_people(draws: Draws) -> str:
    """Return a party's size."""
    return str(draws.between(2, 24))


def draw_price(draws: Draws) -> str:
    """Return a price, whole or with cents."""
    return str(draws.between(9, 480)) + (draws.pick([".50", ".99", ".25"]) if draws.chance(0.3) else "")


def draw_date(draws: Draws) -> str:
    """Return a date in one of three notations."""
    day, month = draws.between(1, 28), draws.pick(MONTHS)
    return draws.pick([f"{month} {day}", f"{day} {month}", draws.pick(DAYS)])


def draw_time(draws: Draws) -> str:
    """Return a time of day in one of four notations."""
    hour, quarter = draws.between(1, 11), draws.pick(["00", "15", "30", "45"])
    return draws.pick([f"{hour} {draws.pick(['am', 'pm'])}", f"{hour + 12}:{quarter}", f"{hour}:{quarter}", "noon"])
