"""Extraction rows: a sentence about an order, a booking or a ticket, and its JSON."""

import json
import re

from datasets_templates import CLOSERS, FAMILIES, OPENERS

SYSTEM = "Turn the sentence into JSON."
NUM_ROWS = {"train": 1080, "heldout": 210}

KEYS = {
    "order": ("item", "quantity", "customer", "city"),
    "booking": ("name", "date", "time", "people"),
    "ticket": ("passenger", "from", "to", "price"),
}
NUMBERS = frozenset({"quantity", "people", "price"})

# Each list: values of both splits, then values that only held-out rows use.
FIRST = (
    "Anna Ben Carla David Emma Felix Grace Hugo Ivan Julia Karl Laura Maria Nina Oscar Paul Rosa Sam Tom Vera Amir Mei "
    "Omar Priya Yuki Lucas Sofia Peter Helen Mark Diana Leo Alice George Sarah Adam Bella Caleb Dmitri Elena Farid "
    "Gwen Hassan Ingrid Joao Kenji Lila Mateo Nadia Otto Pablo Quentin Rachel Stefan Theresa Ulrich Wendy Xavier "
    "Yasmin Zoe Abigail Bjorn Chloe Dennis Esther Francesca",
    "Bruno Clara Erik Fatima Gloria Henry Irene Jack Lena Martin Olga Victor",
)
LAST = (
    "Smith Brown Novak Garcia Miller Lopez Khan Weber Rossi Jensen Park Silva Cohen Murphy Tanaka Clark Young Baker "
    "Walker Green King Hill Scott Adams Fischer Ali Chen Singh Kowalski Okafor Petrov Nguyen Lindqvist Moreau Haddad "
    "Ferreira Yamamoto Schneider Papadopoulos Bianchi Ivanova Delgado Osborne Whitaker Mbeki Sato Keller Dubois",
    "Turner Cook Bell Ward Gray Lee Wood Ross Hansen Costa",
)
CITY = (
    "Paris|London|Berlin|Rome|Madrid|Oslo|Vienna|Prague|Lisbon|Dublin|Athens|Warsaw|Boston|Chicago|Denver|Seattle|"
    "Toronto|Sydney|Tokyo|Delhi|Cairo|Milan|Munich|Geneva|New York|San Diego|Hamburg|Brussels|Austin|Dallas|Krakow|Zurich|"
    "Valencia|Seville|Bilbao|Porto|Naples|Turin|Venice|Bologna|Marseille|Bordeaux|Lille|Toulouse|Antwerp|Rotterdam|"
    "Utrecht|Cologne|Stuttgart|Leipzig|Dresden|Bremen|Salzburg|Graz|Basel|Lausanne|Copenhagen|Aarhus|Gothenburg|"
    "Malmo|Bergen|Helsinki|Tampere|Riga|Tallinn|Vilnius|Gdansk|Budapest|Bucharest|Sofia|Belgrade|Zagreb|Ljubljana|"
    "Istanbul|Ankara|Beirut|Casablanca|Nairobi|Lagos|Accra|Johannesburg|Cape Town|Karachi|Bangkok|Hanoi|Manila|Seoul|"
    "Osaka|Kyoto|Perth|Brisbane|Auckland|Lima|Bogota|Santiago|Havana|Vancouver|Ottawa|Calgary|Houston|Phoenix|"
    "Portland|Detroit|Memphis|Baltimore|San Jose|Salt Lake City|Manchester|Liverpool|Edinburgh|Glasgow|Cardiff",
    "Florence|Barcelona|Stockholm|Atlanta|Miami|Montreal|Melbourne|Mumbai|Los Angeles|Nice",
)
NOUN = (
    "chairs|desks|lamps|shirts|books|pens|mugs|plates|bottles|boxes|bags|cables|phones|tables|shoes|towels|candles|"
    "cups|jackets|batteries|keyboards|blankets|notebooks|bikes|helmets|mirrors|printers|knives|hats|clocks|shelves|"
    "carpets|curtains|envelopes|folders|markers|staplers|headphones|routers|monitors|hammers|ladders|brushes|buckets|"
    "filters|magnets|postcards|puzzles|ribbons|sandals|sweaters|teapots|trays|vases|wallets|whistles|zippers|radios",
    "pillows|spoons|scarves|speakers|tents|umbrellas|gloves|baskets|cameras|screws",
)
ADJECTIVE = (
    "red|blue|green|black|white|small|large|wooden|cheap|heavy|used|glass|steel|soft|office|garden|kitchen|leather|"
    "orange|purple|thin|waterproof|striped|silver|travel|paper|antique|rubber",
    "yellow|plastic|cotton|metal|round|folding",
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = tuple("January February March April May June July August September October November December".split())


def make_extract_rows(split, rng):
    """Return the rows of one split; the families of a kind take turns, so that each is used."""
    rows, seen = [], set()
    kinds = [(kind, FAMILIES[kind][split].strip().splitlines()) for kind in KEYS]
    turn = 0
    while len(rows) < NUM_ROWS[split]:
        kind, patterns = kinds[turn % len(kinds)]
        number = turn // len(kinds) % len(patterns)
        turn += 1
        text, answer = write_sentence(patterns[number], kind, split, rng)
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
    return rng.shuffled(rows)


def write_sentence(pattern, kind, split, rng):
    """Fill one pattern and return the sentence and its answer, the values as written in it."""
    values = {key: draw_value(key, split, rng) for key in KEYS[kind]}
    while kind == "ticket" and values["from"] == values["to"]:
        values["to"] = draw_value("to", split, rng)
    opener = rng.pick(OPENERS[split]) if rng.chance(0.2) else ""
    closer = rng.pick(CLOSERS[split]) if rng.chance(0.3) else ""
    pattern = opener + re.sub(r"\[(.*?)\]", lambda m: rng.pick(m[1].split("|")), pattern) + closer
    text = pattern.format(**values, digits=rng.between(1000, 9999))
    if text[0].islower() and rng.chance(0.5):
        text = text[0].upper() + text[1:]
    change = rng.pick(CASES)
    written = {key: change(value) for key, value in values.items()}
    # A value that opens the sentence may have got a capital there: the answer has what is written.
    text = change(text)
    for key, value in written.items():
        if value not in text:
            written[key] = value[0].upper() + value[1:]
    return text, {key: json.loads(value) if key in NUMBERS else value for key, value in written.items()}


CASES = (str,) * 20 + (str.lower,) * 3 + (str.upper,)


def draw_value(key, split, rng):
    """Return the text of one value."""
    if key in ("customer", "name", "passenger"):
        first = rng.pick(pool(FIRST, split, None, rng))
        return first if rng.chance(0.4) else f"{first} {rng.pick(pool(LAST, split, None, rng))}"
    if key in ("city", "from", "to"):
        return rng.pick(pool(CITY, split, "|", rng))
    if key == "item":
        noun = rng.pick(pool(NOUN, split, "|", rng))
        return noun if rng.chance(0.4) else f"{rng.pick(pool(ADJECTIVE, split, '|', rng))} {noun}"
    return {"quantity": draw_quantity, "people": draw_people, "price": draw_price, "date": draw_date, "time": draw_time}[
        key
    ](rng)


def pool(lists, split, separator, rng):
    """Return the values a split draws from; a third of the held-out draws are of unseen values."""
    known, unseen = (part.split(separator) for part in lists)
    return unseen if split == "heldout" and rng.chance(1 / 3) else known


def draw_quantity(rng):
    """Return a small or a round number of things."""
    return str(rng.between(2, 60) if rng.chance(0.8) else 10 * rng.between(7, 50))


def draw_people(rng):
    """Return a party's size."""
    return str(rng.between(2, 24))


def draw_price(rng):
    """Return a price, whole or with cents."""
    return str(rng.between(9, 480)) + (rng.pick([".50", ".99", ".25"]) if rng.chance(0.3) else "")


def draw_date(rng):
    """Return a date in one of four ways of writing it."""
    day, month = rng.between(1, 28), rng.pick(MONTHS)
    return rng.pick([f"{month} {day}", f"{day} {month}", rng.pick(DAYS)])


def draw_time(rng):
    """Return a time of day in one of three ways of writing it."""
    hour, quarter = rng.between(1, 11), rng.pick(["00", "15", "30", "45"])
    return rng.pick([f"{hour} {rng.pick(['am', 'pm'])}", f"{hour + 12}:{quarter}", f"{hour}:{quarter}", "noon"])
