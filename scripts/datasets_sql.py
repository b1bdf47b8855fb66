"""Rows of the text-to-SQL agent: small databases, questions and the statements that answer them."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Any, Final

from datasets_random import Draws

NUM_ROWS: Final = {"train": 240, "heldout": 60}
NUM_OWNERS: Final = 9
NUM_ITEMS: Final = 30


@dataclass(frozen=True)
class World:
    """Two tables: owners, each with a place, and items that belong to them."""

    owners: str
    owner: str
    """Singular."""
    names: tuple[str, ...]
    place: str
    places: tuple[str, ...]
    items: str
    kind: str
    kinds: tuple[str, ...]
    amount: str
    highest: int


WORLDS: Final = {
    "train": (
        World("customers", "customer", ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ida"), "city",
              ("Oslo", "Turin", "Ghent"), "orders", "product", ("lamp", "chair", "desk", "shelf"), "price", 400),
        World("teams", "team", ("Falcons", "Otters", "Wolves", "Bears", "Lynxes", "Cranes", "Foxes", "Moles", "Hares"),
              "league", ("north", "south"), "games", "venue", ("arena", "park", "hall"), "goals", 9),
        World("farms", "farm", ("Alder", "Birch", "Cedar", "Elm", "Fir", "Hazel", "Larch", "Maple", "Oak"), "valley",
              ("upper", "middle", "lower"), "harvests", "crop", ("barley", "oats", "rye", "maize"), "tons", 90),
        World("writers", "writer", ("Amis", "Behn", "Clare", "Dunne", "Ellis", "Frame", "Green", "Hogg", "Innes"),
              "country", ("Chile", "Kenya", "Japan"), "books", "genre", ("novel", "essay", "poem"), "pages", 800),
    ),
    "heldout": (
        World("clinics", "clinic", ("Aspen", "Bluff", "Canal", "Dell", "Eagle", "Ferry", "Grove", "Haven", "Inlet"),
              "region", ("east", "west", "centre"), "visits", "ward", ("eyes", "bones", "heart"), "minutes", 120),
        World("ships", "ship", ("Anna", "Brise", "Comet", "Delta", "Etoile", "Fleur", "Gale", "Hera", "Iris"), "port",
              ("Cork", "Brest", "Vigo"), "voyages", "cargo", ("grain", "coal", "cotton"), "days", 60),
    ),
}  # fmt: skip
QUESTIONS: Final = (
    ("How many {items} have a {kind} of {k}?", "SELECT COUNT(*) FROM {items} WHERE {kind} = '{k}'"),
    ("What is the total {amount} of the {items} of {name}?",
     "SELECT SUM({amount}) FROM {items} JOIN {owners} ON {owners}.id = {owner}_id WHERE name = '{name}'"),
    ("Which {owners} are in {place} {p}? Give the names in alphabetical order.",
     "SELECT name FROM {owners} WHERE {place} = '{p}' ORDER BY name"),
    ("Give each {kind} and how many {items} it has.", "SELECT {kind}, COUNT(*) FROM {items} GROUP BY {kind}"),
    ("What is the mean {amount} of {items} with a {kind} of {k}?",
     "SELECT AVG({amount}) FROM {items} WHERE {kind} = '{k}'"),
    ("Give the names of the {owners} with more than {n} {items}.",
     "SELECT name FROM {owners} JOIN {items} ON {owners}.id = {owner}_id GROUP BY {owners}.id HAVING COUNT(*) > {n}"),
    ("Give the three highest values of {amount} among the {items}, the highest first.",
     "SELECT {amount} FROM {items} ORDER BY {amount} DESC LIMIT 3"),
    ("For each {place}, what is the highest {amount} of the {items} of its {owners}?",
     "SELECT {place}, MAX({amount}) FROM {owners} JOIN {items} ON {owners}.id = {owner}_id GROUP BY {place}"),
    ("Which {owners} have no {items} with a {kind} of {k}? Give their names.",
     "SELECT name FROM {owners} WHERE id NOT IN (SELECT {owner}_id FROM {items} WHERE {kind} = '{k}')"),
    ("How many {items} have a higher {amount} than the mean of all {items}?",
     "SELECT COUNT(*) FROM {items} WHERE {amount} > (SELECT AVG({amount}) FROM {items})"),
)  # fmt: skip


def make_sql_rows(split: str, draws: Draws) -> list[dict[str, Any]]:
    """Return questions with the statement that answers each and a script that makes its database."""
    rows = []
    for number in range(NUM_ROWS[split]):
        world = WORLDS[split][number % len(WORLDS[split])]
        question, statement = QUESTIONS[number // len(WORLDS[split]) % len(QUESTIONS)]
        while True:
            values = {
                **vars(world),
                "k": draws.pick(world.kinds),
                "p": draws.pick(world.places),
                "name": draws.pick(world.names),
                "n": draws.between(2, 4),
            }
            answer, script = statement.format(**values), _script(world, draws)
            if _is_telling(answer, script):
                break
        fields = {"question": question.format(**values), "answer": answer, "database": script}
        rows.append(fields | {"family": f"sql-{split}-{world.owners}"})
    return rows


def _is_telling(statement: str, script: str) -> bool:
    """Whether a statement has a result, and another one without every third row, as in the environment."""
    database = sqlite3.connect(":memory:")
    try:
        database.executescript(script)
        whole = database.execute(statement).fetchall()
        for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            database.execute(f"DELETE FROM {table} WHERE rowid % 3 = 0")
        return bool(whole) and whole != [(None,)] and database.execute(statement).fetchall() != whole
    finally:
        database.close()


def _script(world: World, draws: Draws) -> str:
    owners = [f"({number + 1}, '{world.names[number]}', '{draws.pick(world.places)}')" for number in range(NUM_OWNERS)]
    items = []
    for number in range(NUM_ITEMS):
        owner, kind, amount = draws.between(1, NUM_OWNERS), draws.pick(world.kinds), draws.between(1, world.highest)
        items.append(f"({number + 1}, {owner}, '{kind}', {amount})")
    return (
        f"CREATE TABLE {world.owners} (id INTEGER PRIMARY KEY, name TEXT, {world.place} TEXT);\n"
        f"CREATE TABLE {world.items} (id INTEGER PRIMARY KEY, {world.owner}_id INTEGER REFERENCES {world.owners}(id), "
        f"{world.kind} TEXT, {world.amount} INTEGER);\n"
        f"INSERT INTO {world.owners} VALUES {', '.join(owners)};\n"
        f"INSERT INTO {world.items} VALUES {', '.join(items)};"
    )
