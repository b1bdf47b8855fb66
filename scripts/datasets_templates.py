"""Sentence patterns of the extraction data, by kind and split.

Each line is one template family. `{slot}` is replaced by a value, `[a|b]` by one of the variants. Held-out
families are worded differently from all training families of their kind; none is used in both splits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

ORDER_TRAIN: Final = """
{customer} [wants|needs|would like] {quantity} {item} [sent|shipped|delivered] to {city}.
Please [send|ship] {quantity} {item} to {customer} in {city}.
[Order|New order]: {quantity} {item}, {customer}, {city}.
{quantity} {item} for {customer}, [deliver to|ship to] {city}.
[Hi|Hello], this is {customer} from {city}, [I need|I'd like] {quantity} {item}.
{city} [called|wrote]: {customer} is out of {item} and needs {quantity}.
I am {customer} and I [want|would like to buy] {quantity} {item}. [Deliver|Ship] to {city}.
Can you [get|send] {customer} {quantity} {item}? The address is in {city}.
From {city}: {quantity} {item} on the account of {customer}.
{customer} ({city}) - {quantity} x {item}
Customer {customer} [ordered|bought] {item}, quantity {quantity}, going to {city}.
We [just got|received] an order from {customer} in {city} for {quantity} {item}.
Put {customer} down for {quantity} {item}; [they go|shipping] to {city}.
{item}: {quantity} pieces. Buyer {customer}. Destination {city}.
The [shop|office|school] in {city} asked for {quantity} {item}, contact {customer}.
Yesterday {customer} [phoned|emailed] about {quantity} {item} for {city}.
{quantity} {item} [should|must] go to {city}, and the bill goes to {customer}.
Could {customer} have {quantity} {item} by Friday? We are in {city}.
Add {quantity} {item} to the [order|basket] of {customer}, {city}.
My name is {customer}. I live in {city}. I need {quantity} {item}.
To {city}, for {customer}: {item}, {quantity} of them.
{customer} in {city} is [asking|waiting] for {quantity} {item}.
Ship to {city}. {quantity} {item}. Name: {customer}.
A parcel with {quantity} {item} is due in {city} for {customer}.
Our customer {customer} [moved to|lives in] {city} and wants {quantity} {item} there.
[Reserve|Pack] {quantity} {item} for {customer} of {city}.
Quantity: {quantity}. Product: {item}. Client: {customer}. City: {city}.
In {city}, {customer} is opening a shop and [orders|takes] {quantity} {item}.
{customer} says the {city} [team|branch] needs {quantity} more {item}.
How fast can {quantity} {item} get to {customer} in {city}?
{customer}, {city}: {quantity} {item} [please|asap].
Bring {customer} {quantity} {item}, the street is in {city}.
{quantity} {item} were ordered by {customer} for the [house|store] in {city}.
[They want|We want] {quantity} {item} in {city}. [Ask|Talk to] {customer}.
[Good news|Heads up], {customer} wants {quantity} {item}, to be sent to {city}.
Mail {item} to {customer}, {city}. Make it {quantity}.
Our client in {city}, {customer}, takes {quantity} {item}.
You can send {customer} the {quantity} {item} to {city} now.
Purchase of {quantity} {item} by {customer} from {city}.
{customer} bought {quantity} {item} and has them shipped home to {city}.
"""

ORDER_HELDOUT: Final = """
[We sold|Sold] {quantity} {item} to {customer}, who lives in {city}.
[Thanks for|About] your call, {customer}: we will bring {quantity} {item} to {city}.
Invoice {customer}, {city}, for {quantity} {item}.
It's {customer} again. Same as before, {quantity} {item}, and to {city} please.
{city} delivery for {customer}: {quantity} {item}.
For the [wedding|party] in {city}, {customer} ordered {quantity} {item}.
{customer} paid for {quantity} {item}, [now they must reach|please get them to] {city}.
Would you mail {quantity} {item} to my friend {customer} in {city}?
{customer} takes {quantity} {item} and picks them up in {city}.
Someone called {customer} in {city} [needs|wants] {item}, {quantity} in total.
"""

BOOKING_TRAIN: Final = """
[Book|Reserve] a table for {people} on {date} at {time}, name {name}.
{name} [wants|would like] a table for {people} at {time} on {date}.
Table for {people}, {date}, {time}, {name}.
[Hi|Hello], I'm {name}. Do you have room for {people} on {date} at {time}?
Reservation: {name}, {people} guests, {date} {time}.
On {date} at {time} we will be {people} people, under {name}.
Please [hold|keep] {people} seats for {name}, {time}, {date}.
{people} [people|persons], {time} on {date}. The name is {name}.
Name: {name}. Date: {date}. Time: {time}. Guests: {people}.
Can {name} come on {date} with a group of {people}, around {time}?
{name} is coming at {time} on {date}, party of {people}.
We need the room on {date}, {time}, for {people} people. Contact: {name}.
{date}: {name} at {time}, {people} covers.
My name is {name} and I'd like to [eat|have dinner] with you on {date}, {time}, {people} of us.
Put {name} down for {time}, {date}, {people} people.
There will be {people} of us on {date}. We arrive at {time}. Ask for {name}.
At {time} on {date} {name} [expects|brings] {people} guests.
Could you fit in {people} guests at {time}? It's for {date}, name of {name}.
{name} for {people}, {time}, {date}
Guests {people}, name {name}, {date} at {time}.
A table under {name}, please: {date}, {time}, {people} people.
{name} called and booked {date} at {time} for {people}.
[Is {time} on {date} free|Would {time} on {date} be fine] for {people}? Regards, {name}.
For {people} people: {date}, {time}. {name} will pay.
We are {people} and want to come {date} at {time}. {name}.
I'd like to [make a booking|book] for {date}. {people} people, {time}, {name}.
The {time} slot on {date} goes to {name}, {people} players.
{name} has a [meeting|class] with {people} people on {date}, starting {time}.
It is {name}'s birthday on {date}: {people} guests from {time}.
Dinner on {date}, {people} people, {time} sharp, [host|booked by] {name}.
{name}, {date}, {people} people, {time}.
[Expect|Welcome] {people} guests on {date}: {name} arrives at {time}.
We are a group of {people}, see you {date} at {time}, {name}.
{name} asks if {people} people can come at {time} on {date}.
Change it to {date}, {time}, for {people}. {name}
{name} told us: {date} at {time}, and there are {people} people.
Add a booking for {name}: {people} people, {date} at {time}.
[Set|Prepare] a table on {date} for {people} guests of {name}, they come at {time}.
{date}, {time}: table for {people}, {name}.
At {time} a group of {people} arrives, it is {date}, and {name} is the host.
"""

BOOKING_HELDOUT: Final = """
[Lunch|Brunch] for {people} at {time} on {date}, please, for {name}.
{name} here, we'd like to come on {date} at {time}, {people} people in all.
Please expect {name} and company, {people} in all, on {date} at {time}.
Note for {date}: {people} guests at {time}, booked by {name}.
Any chance of a table at {time} on {date}? {people} people, {name}.
{name} reserved {time} on {date} for a party of {people}.
We'll be {people} on {date}, say {time}. Put it under {name}.
Confirm {name}: {people} guests, {time}, {date}.
A group of {people} led by {name} arrives on {date} at {time}.
Write down {date}, {time}, {name}, {people} people.
"""

TICKET_TRAIN: Final = """
[One|A] ticket from {from} to {to} for {passenger}, {price} euros.
{passenger} [travels|flies|goes] from {from} to {to} for {price} dollars.
{passenger} paid ${price} for the [train|bus|flight] from {from} to {to}.
From {from} to {to}, passenger {passenger}, price {price}.
Please [book|buy] {passenger} a seat from {from} to {to}, at most {price} dollars.
The [fare|trip] from {from} to {to} costs {price} euros, it's for {passenger}.
Passenger: {passenger}. From: {from}. To: {to}. Price: {price}.
{from} to {to}, {passenger}, ${price}
I'm {passenger}, I need to get to {to} from {from}. My budget is {price} dollars.
For ${price}, {passenger} can go to {to} from {from}.
{passenger} leaves {from} for {to}; the ticket was {price} euros.
A [bus|train] to {to}, starting in {from}, for {passenger}. It is {price} dollars.
Ticket sold: {passenger}, {from} - {to}, {price} EUR.
We charged {passenger} {price} dollars for {from} to {to}.
To {to} from {from}: {price} euros, in the name of {passenger}.
[Hi|Hello], {passenger} here. How do I get from {from} to {to} for ${price}?
{price} dollars, {from} to {to}, for {passenger}.
Going to {to}: {passenger}. Coming from {from}. Paid: {price}.
{passenger} is in {from} and wants a ticket to {to} for {price} euros.
The seat of {passenger} on the way from {from} to {to} is ${price}.
Send {passenger} from {from} to {to}. Cost: {price} euros.
{passenger} will take the {from} to {to} [train|ferry], price {price} dollars.
Price {price}, destination {to}, origin {from}, traveller {passenger}.
[Is|Was] {price} euros right for {passenger} from {from} to {to}?
Leaving {from}, arriving in {to}: {passenger}, {price} dollars.
The flight to {to} leaves from {from}, {passenger} booked it at ${price}.
{passenger} asked for the cheapest way from {from} to {to} and got {price} euros.
In {from}, {passenger} bought a ticket to {to} at {price} dollars.
At {price} euros, the night train from {from} to {to} suits {passenger}.
My ticket [says|shows] {from} to {to}, {price} dollars. I am {passenger}.
{passenger}: {from} to {to}, {price} dollars, [paid|unpaid].
[Get|Find] {passenger} out of {from} and into {to} for under ${price}.
Bus from {from}, destination {to}, {price} euros, {passenger}.
{passenger} spent {price} euros to travel to {to} from {from}.
{from} - {to}: {passenger} pays {price} dollars.
We have {passenger} on the {from} to {to} flight at ${price}.
[Cancel|Change] the ticket of {passenger}, {from} to {to}, {price} dollars.
The way to {to} is long: {passenger} starts in {from} and pays {price} euros.
A seat for {passenger} is ${price}, it goes from {from} to {to}.
It was {price} dollars when {passenger} went from {from} to {to}.
"""

TICKET_HELDOUT: Final = """
[We need|Get] a ticket to {to} for {passenger}, who starts in {from}, for {price} euros.
{passenger} found a {price} dollar fare from {from} to {to}.
Reserve the trip {from} to {to} for {passenger}; it costs {price} euros.
{passenger} has to be in {to}. The coach from {from} is ${price}.
How about {price} dollars for {passenger}, {from} to {to}?
Travelling from {from} to {to} is {passenger}, who paid {price} euros.
Refund {passenger} ${price}: the train from {from} to {to} was cancelled.
It costs {price} euros to bring {passenger} from {from} to {to}.
On the {from} to {to} line, {passenger} paid {price} dollars.
Name on the ticket {passenger}, route {from} to {to}, total {price} euros.
"""

FAMILIES: Final[Mapping[str, Mapping[str, str]]] = {
    "order": {"train": ORDER_TRAIN, "heldout": ORDER_HELDOUT},
    "booking": {"train": BOOKING_TRAIN, "heldout": BOOKING_HELDOUT},
    "ticket": {"train": TICKET_TRAIN, "heldout": TICKET_HELDOUT},
}

OPENERS: Final[Mapping[str, list[str]]] = {
    "train": ["Hi, ", "Hello! ", "Good morning. ", "Hey, ", "Dear team, ", "New message: ", "Quick note: ", "FYI: "],
    "heldout": ["Hi, ", "Good evening. ", "Hello there. ", "To the front desk: ", "Hey, "],
}
CLOSERS: Final[Mapping[str, list[str]]] = {
    "train": [
        " Thanks!",
        " Thank you.",
        " No hurry.",
        " Call 555-{digits} with questions.",
        " Ref {digits}.",
        " Please confirm by email.",
        " It is urgent.",
        " Same card as last time.",
        " Our office closes at 6.",
        " Sorry for the late notice.",
        " Best wishes!",
    ],
    "heldout": [
        " Thanks!",
        " Many thanks.",
        " Phone 555-{digits}.",
        " My number is {digits}.",
        " Let me know soon.",
        " Have a nice day!",
        " I will pay by card.",
    ],
}
