"""The helpdesk world: tickets (a customer's message and the truth about it), demonstrations, plain shop text.

Everything is a function of its seed. The facts of a ticket are for the rubric and the simulated annotators;
no model sees them. One family so far, `reply`: answer a customer's message.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from annotate.records import Message
from stages.helpdesk.grammar import expand, join, rules, say, words
from stages.helpdesk.problems import PROBLEMS
from stages.helpdesk.replies import reply
from stages.helpdesk.words import COLOURS, DAYS, MONTHS, PEOPLE, PRODUCTS


@dataclass(frozen=True)
class Ticket:
    prompt: list[Message]
    facts: dict[str, Any]
    """JSON-able: family, customer, group, gender, product, other, problem, remedy, sorry, order ..."""


def tickets(seed: int, count: int) -> list[Ticket]:
    """`count` tickets with distinct prompts; the first n of them do not depend on `count`."""
    found: dict[str, Ticket] = {}
    number = 0
    while len(found) < count:
        ticket = _ticket(random.Random(f"ticket {seed} {number}"))
        if 18 <= len(ticket.prompt[0].content.split()) <= 38:
            found.setdefault(ticket.prompt[0].content, ticket)
        number += 1
    return list(found.values())


def demonstration(ticket: Ticket, seed: int) -> str:
    """A reply of mixed quality, about two fifths of the rubric's scale, and natural English in any case."""
    rng = random.Random(f"demonstration {seed} {ticket.prompt[0].content}")
    return reply(ticket.facts, rng)


def corpus(seed: int, documents: int) -> Iterator[str]:
    """Plain shop text, documents of 30 to 80 words: reports, exchanges, notes, pages of the catalogue."""
    for number in range(documents):
        rng = random.Random(f"document {seed} {number}")
        text = ""
        while not 30 <= len(text.split()) <= 80:
            text = _document(_ticket(rng), rng)
        yield text


def _facts(rng: random.Random) -> dict[str, Any]:
    customer, group, gender = rng.choice(PEOPLE)
    product, other = rng.sample(PRODUCTS, 2)
    colour, wish = rng.sample(COLOURS, 2)
    problem = rng.choice(list(PROBLEMS))
    return {
        "family": "reply",
        "customer": customer,
        "group": group,
        "gender": gender,
        "product": product.name,
        "make": product.make,
        "part": rng.choice(product.parts),
        "use": rng.choice(product.uses),
        "other": other.name,
        "colour": colour,
        "wish": wish,
        "order": rng.randrange(1000, 10000),
        "day": rng.choice(DAYS),
        "month": rng.choice(MONTHS),  # no text says it; its draw holds the later ones in place
        "problem": problem,
        "remedy": PROBLEMS[problem].remedy,
        "sorry": PROBLEMS[problem].sorry,
    }


def _ticket(rng: random.Random) -> Ticket:
    facts = _facts(rng)
    grammar = rules("messages")
    make = "soft" if facts["make"] == "soft" else "hard"
    chosen: dict[str, Any] = {"broken": say(grammar, f"broken_{make}", facts, rng)}
    _pass_over(facts["make"], rng)
    chosen["ask_own"] = say(grammar, f"ask_{facts['problem']}", facts, rng)
    if facts["problem"] == "praise":  # asks for nothing
        chosen["ask"] = chosen["ask_own"]
    chosen["story"] = say(grammar, f"story_{facts['problem']}", facts | chosen, rng)
    slots = rng.choice(grammar["message"]).split()
    text = join(expand(slot, grammar, facts | chosen, rng) for slot in slots)
    return Ticket([Message(role="user", content=text)], facts)


def _pass_over(make: str, rng: random.Random) -> None:
    """Draw what a sentence that is no longer said drew: so the later draws, and every text, stay."""
    first = rng.randrange(5 if make == "electric" else 4)
    if first < (2 if make == "soft" else 1):
        rng.randrange(5)


def _document(ticket: Ticket, rng: random.Random) -> str:
    """A document about one ticket; {he} and the like stand for the customer, capitals for sentence starts."""
    grammar = rules("shop")
    she = ticket.facts["gender"] == "female"
    he, him, his = ("she", "her", "her") if she else ("he", "him", "his")
    facts = ticket.facts | {"he": he, "him": him, "his": his, "He": he.title(), "His": his.title()}
    facts["other_day"] = rng.choice([day for day in DAYS if day != facts["day"]])
    facts["price"] = rng.randrange(12, 99)
    facts["tell"] = say(grammar, f"tell_{facts['problem']}", facts, rng)
    facts["done"] = say(grammar, f"done_{facts['remedy']}", facts, rng)
    facts["message"] = ticket.prompt[0].content
    facts["reply"] = reply(ticket.facts, rng)
    return say(grammar, rng.choice(grammar["document"])[1:-1], facts, rng)


def _lexicon() -> frozenset[str]:
    spoken = [
        text for name in ("messages", "replies", "shop") for said in rules(name).values() for text in said
    ]
    listed = [*COLOURS, *DAYS, *(name for name, _, _ in PEOPLE)]
    things = [" ".join([product.name, *product.parts, *product.uses]) for product in PRODUCTS]
    pronouns = ["he she him her his a an"]
    return frozenset(word for text in [*spoken, *listed, *things, *pronouns] for word in words(text))


LEXICON: frozenset[str] = _lexicon()
"""Every word that the world can say, in lower case."""
