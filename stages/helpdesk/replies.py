"""Demonstrations: replies of mixed quality, each component there, absent or wrong, drawn independently.

So every combination occurs, and a policy that has learnt to imitate them writes a full reply now and then.
"""

import random
from collections.abc import Mapping
from typing import Any

from stages.helpdesk.grammar import join, rules, say
from stages.helpdesk.problems import REMEDIES
from stages.helpdesk.words import PEOPLE, PRODUCTS

CHANCES: dict[str, dict[str, float]] = {
    "name": {"right": 0.56, "wrong": 0.05},
    "greeting": {"there": 0.6},  # without a name
    "thanks": {"there": 0.5},
    "reaction": {"right": 0.5, "wrong": 0.12},
    "product": {"right": 0.56, "wrong": 0.08},
    "remedy": {"right": 0.46, "wrong": 0.18, "vague": 0.26},
    "rude": {"there": 0.1},
    "filler": {"there": 0.4},
    "promise": {"there": 0.1},
    "help": {"there": 0.45},
    "signoff": {"there": 0.55},
}


def reply(facts: Mapping[str, Any], rng: random.Random) -> str:
    """Greeting, thanks, reaction, what was done so far, offer, closing: the order in which people write."""
    plan = {component: _pick(rng, chances) for component, chances in CHANCES.items()}
    if not (plan["reaction"] or plan["remedy"]):
        plan["remedy"] = "vague"
    named = _named(plan, rng)
    facts = {**facts, **_choices(facts, plan, rng)}
    symbols = {
        "greeting": "greeting_name" if plan["name"] else plan["greeting"] and "greeting_plain",
        "thanks": plan["thanks"] and "thanks",
        "reaction": plan["reaction"] and _reaction(facts, right=plan["reaction"] == "right"),
        "rude": plan["rude"] and "rude",
        "look": "look" if "look" in named else plan["filler"] and "filler",
        "offer": plan["remedy"] and ("vague" if plan["remedy"] == "vague" else "offer"),
        "promise": plan["promise"] and "promise",
        "help": plan["help"] and "help",
        "signoff": plan["signoff"] and "signoff",
    }
    grammar = rules("replies")
    facts["do"] = say(grammar, f"do_{facts['remedy']}" + "_named" * ("offer" in named), facts, rng)
    for component in named - {"offer"}:
        symbols[component] += "_named"
    return join(say(grammar, symbol, facts, rng) for symbol in symbols.values() if symbol)


def _choices(facts: Mapping[str, Any], plan: Mapping[str, str], rng: random.Random) -> dict[str, Any]:
    """The name, product and remedy that this reply uses: the ticket's, or another's by mistake."""
    name, item, remedy = facts["customer"], facts["product"], facts["remedy"]
    if plan["name"] == "wrong":
        name = rng.choice([other for other, _, _ in PEOPLE if other != name])
    if plan["product"] == "wrong":
        item = rng.choice([p.name for p in PRODUCTS if p.name not in (item, facts["other"])])
    if plan["remedy"] == "wrong":
        remedy = rng.choice([other for other in REMEDIES if other != remedy])
    return {"name": name, "item": item, "remedy": remedy}


def _named(plan: Mapping[str, str], rng: random.Random) -> set[str]:
    """The sentences that name the product: one that can, perhaps the offer too; `look` if none can."""
    if not plan["product"]:
        return set()
    able = [part for part in ("thanks", "reaction") if plan[part]]
    able += ["offer"] if plan["remedy"] in ("right", "wrong") else []
    if not able:
        return {"look"}
    first = rng.choice(able)
    again = rng.random() < 0.2 and "offer" in able
    return {first, "offer"} if again else {first}


def _reaction(facts: Mapping[str, Any], right: bool) -> str:
    if facts["sorry"] == right:
        return "sorry"
    return "glad_praise" if facts["problem"] == "praise" else "glad"


def _pick(rng: random.Random, chances: Mapping[str, float]) -> str:
    """A key with its chance, or "" with the rest."""
    at = rng.random()
    for key, chance in chances.items():
        if at < chance:
            return key
        at -= chance
    return ""
