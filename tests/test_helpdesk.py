"""The helpdesk: rich, plain and deterministic; a rubric that tricks do not move; annotators as described."""

import json
import random
import re
from itertools import islice
from pathlib import Path
from statistics import mean

import pytest

from annotate.records import DataError, task_id
from stages.helpdesk import rubric
from stages.helpdesk.__main__ import samples
from stages.helpdesk.annotators import ANNOTATORS, judge
from stages.helpdesk.grammar import rules, words
from stages.helpdesk.problems import PROBLEMS, REMEDIES
from stages.helpdesk.words import PEOPLE, PRODUCTS
from stages.helpdesk.world import LEXICON, corpus, demonstration, tickets

TICKETS = tickets(1, 5000)
PROMPTS = [ticket.prompt[0].content for ticket in TICKETS]
DEMONSTRATIONS = [demonstration(ticket, 1) for ticket in TICKETS]
CORPUS = list(corpus(1, 2000))
SCORES = [rubric.score(t.facts, reply).total for t, reply in zip(TICKETS, DEMONSTRATIONS, strict=True)]

FACTS = {
    "customer": "Anna", "product": "kettle", "other": "drum", "order": 1234,
    "problem": "broken", "remedy": "replace", "sorry": True,
}  # fmt: skip
GOOD = (
    "Hello Anna, thank you for your message. I am sorry about the trouble with your kettle. "
    "We will send you a new one. Kind regards, the shop team."
)


def points(reply: str, **facts: object) -> float:
    return rubric.score(FACTS | facts, reply).total


def test_prompts_are_distinct_and_varied():
    names = "|".join(sorted((*(n for n, _, _ in PEOPLE), *(p.name for p in PRODUCTS)), key=len, reverse=True))
    masked = {re.sub(rf"\b(?:{names}|\d+)\b", "_", prompt) for prompt in PROMPTS}
    assert len(set(PROMPTS)) == 5000
    assert len(masked) >= 1000
    assert len({word for text in [*PROMPTS, *DEMONSTRATIONS, *CORPUS] for word in words(text)}) >= 600
    assert {ticket.facts["problem"] for ticket in TICKETS} == set(PROBLEMS)
    assert len({ticket.facts["group"] for ticket in TICKETS}) == 4


def test_lengths():
    assert all(18 <= len(prompt.split()) <= 38 for prompt in PROMPTS)
    assert 24 <= mean(len(d.split()) for d in DEMONSTRATIONS) <= 40
    assert max(len(d.split()) for d in DEMONSTRATIONS) <= 60, "a natural reply must not cost for its length"
    assert all(30 <= len(text.split()) <= 80 and "\n" not in text for text in CORPUS)


def test_everything_is_a_function_of_the_seed():
    assert tickets(1, 50) == TICKETS[:50]
    assert tickets(2, 50) != TICKETS[:50]
    assert [demonstration(ticket, 1) for ticket in TICKETS[:50]] == DEMONSTRATIONS[:50]
    assert demonstration(TICKETS[0], 2) != DEMONSTRATIONS[0]
    assert list(islice(corpus(1, 10**9), 20)) == CORPUS[:20]
    assert next(corpus(2, 1)) != CORPUS[0]


def test_facts_can_be_stored_and_are_in_the_prompt():
    for ticket, prompt in zip(TICKETS, PROMPTS, strict=True):
        assert json.loads(json.dumps(ticket.facts)) == ticket.facts
        assert ticket.facts["customer"] in prompt and ticket.facts["product"] in prompt
        assert ticket.facts["problem"] != "wrong" or ticket.facts["other"] in prompt


def test_every_text_is_whole_and_of_known_words():
    for text in [*PROMPTS, *DEMONSTRATIONS, *CORPUS]:
        assert rubric.lexicon_share(text) == 1
        assert "{" not in text and "  " not in text and text[-1] in ".?!", text
        assert re.match(r"[A-Z]", text) and not re.search(r"[.?!] [a-z]|\b(\w+) \1\b|\ba [aeiou]", text), text
    assert rubric.lexicon_share("The kettle flurbs.") == pytest.approx(2 / 3)
    assert len(LEXICON) >= 600


def test_demonstrations_leave_room_and_reach_the_top():
    share = mean(SCORES) / rubric.MAXIMUM
    assert 0.40 <= share <= 0.47
    assert 0.02 <= mean(total >= 0.9 * rubric.MAXIMUM for total in SCORES) <= 0.08
    parts = [rubric.score(t.facts, d).parts for t, d in zip(TICKETS, DEMONSTRATIONS, strict=True)]
    for part in ("name", "thanks", "reaction", "product", "remedy", "ending"):
        assert 0.4 <= mean(score[part] > 0 for score in parts) <= 0.6, part
    for part in ("language", "repeats", "length"):
        assert mean(score[part] < 0 for score in parts) < 0.01, f"{part}: natural texts must not pay"


def test_components_are_drawn_independently():
    parts = [rubric.score(t.facts, d).parts for t, d in zip(TICKETS, DEMONSTRATIONS, strict=True)]
    with_name = mean(score["remedy"] == 3 for score in parts if score["name"] > 0)
    without = mean(score["remedy"] == 3 for score in parts if score["name"] <= 0)
    assert abs(with_name - without) < 0.05


def test_a_good_reply_reaches_the_maximum():
    assert points(GOOD) == rubric.MAXIMUM
    assert sum(rubric.score(FACTS, GOOD).parts.values()) == rubric.MAXIMUM


@pytest.mark.parametrize("problem", PROBLEMS)
def test_every_problem_can_be_answered_fully(problem):
    theirs = [ticket for ticket in TICKETS if ticket.facts["problem"] == problem]
    written = (rubric.score(t.facts, demonstration(t, seed)).total for seed in range(9) for t in theirs)
    assert len(theirs) > 250
    assert rubric.MAXIMUM in written


@pytest.mark.parametrize(
    ("change", "cost", "part"),
    [
        (("Anna", "Omar"), 2.5, "name"),
        (("Hello Anna", "Hello there"), 1.5, "name"),
        (("thank you for your message. ", ""), 1, "thanks"),
        (("I am sorry about the trouble with your kettle. ", "We are happy to help you. "), 4.5, "reaction"),
        (("your kettle", "your drill"), 2.5, "product"),
        (("send you a new one", "cancel your order"), 4, "remedy"),
        (("We will send you a new one. ", "We will look into it. "), 3, "remedy"),
        (("We will send you", "We will not send you"), 3, "remedy"),
        ((" Kind regards, the shop team.", ""), 1, "ending"),
        (("Kind", "Please do not bother us again. Kind"), 2, "rude"),
        (("Kind", "You will also get a free gift. Kind"), 2, "promise"),
        (("Kind", "The order number is 77. Kind"), 2, "promise"),
    ],
)
def test_one_fault_costs_its_points(change, cost, part):
    found = rubric.score(FACTS, GOOD.replace(*change))
    good = rubric.score(FACTS, GOOD)
    assert found.parts[part] < good.parts[part]
    assert good.total - found.total == pytest.approx(cost, abs=1), found.parts


def test_an_apology_needs_a_reason():
    polite = GOOD.replace("I am sorry about the trouble", "We are happy to help you").replace(
        "send", "now send"
    )
    wanted = dict(problem="cancel", remedy="cancel", sorry=False)
    polite = polite.replace("now send you a new one", "cancel your order")
    assert points(polite, **wanted) == rubric.MAXIMUM
    apologetic = GOOD.replace("send you a new one", "cancel your order")
    assert points(apologetic, **wanted) == rubric.MAXIMUM - 3


@pytest.mark.parametrize(
    ("reply", "most"),
    [
        ("", 0),
        (".", 0),
        ("\ufffd\ufffd \u00e9\u00df 12 ###", 0),
        ("Anna kettle sorry thank you new kettle kind regards", 0),
        ("Anna. Kettle. Sorry. Thank you. New one. Kind regards.", 2),
        ("Thank you Anna sorry kettle send you a new one, kind regards, the shop team.", 2),
        ("Hello Anna, thank you for your message. I am sorry about the tr", 3),
        ("Hello Anna. " * 12, 0),
        ("Thank you for your message. " * 8, 0),
        (GOOD + " " + GOOD, 6),
        (" ".join([GOOD] * 6), 2),
        (GOOD.upper(), 6),
    ],
)
def test_cheap_texts_stay_low(reply, most):
    assert points(reply) <= most


def test_listing_every_remedy_does_not_pay():
    grammar = rules("replies")
    says = [grammar[f"do_{remedy}"][0].format(use="clean") for remedy in REMEDIES]
    one_sentence = GOOD.replace("send you a new one", " and ".join(says))
    many = GOOD.replace("We will send you a new one.", " ".join(f"We will {act}." for act in says))
    two = GOOD.replace("a new one.", "a new one. We will cancel your order.")
    assert points(two) <= points(GOOD) - 4
    assert points(one_sentence) <= 4 and points(many) <= 4


def test_salad_and_borrowed_texts_stay_low():
    rng = random.Random(0)
    known = sorted(LEXICON)
    for ticket, reply, text in zip(TICKETS[:300], DEMONSTRATIONS, CORPUS, strict=False):
        salad = " ".join(rng.choice(known) for _ in range(30)).capitalize() + "."
        shuffled = " ".join(rng.sample(reply.split(), len(reply.split())))
        for junk in (salad, shuffled, ticket.prompt[0].content):
            assert rubric.score(ticket.facts, junk).total <= 1, junk
        assert rubric.score(ticket.facts, text).total <= 4


def test_the_rubric_is_coarse_and_bounded():
    assert all(total * 2 == int(total * 2) for total in SCORES)
    assert min(SCORES) == rubric.MINIMUM and max(SCORES) == rubric.MAXIMUM


PAIRS = [(t, [d, demonstration(t, 2)]) for t, d in zip(TICKETS[:2500], DEMONSTRATIONS, strict=False)]


def verdicts(annotator: str, seed: int = 0) -> list[int | None]:
    return [judge(annotator, seed, task_id(t.prompt, shown), t.facts, shown) for t, shown in PAIRS]


@pytest.mark.parametrize(
    ("annotator", "low", "high"), [("ada", 0.86, 0.92), ("ben", 0.82, 0.88), ("cleo", 0.7, 0.79)]
)
def test_annotators_agree_with_the_rubric_as_told(annotator, low, high):
    gaps = [rubric.score(t.facts, a).total - rubric.score(t.facts, b).total for t, (a, b) in PAIRS]
    found = verdicts(annotator)
    decided = [
        (verdict > 0) == (gap > 0) for verdict, gap in zip(found, gaps, strict=True) if verdict and gap
    ]
    assert low <= mean(decided) <= high
    assert set(found) >= {-3, -2, -1, 0, 1, 2, 3, None}
    strong = [abs(gap) for verdict, gap in zip(found, gaps, strict=True) if verdict in (-3, 3)]
    weak = [abs(gap) for verdict, gap in zip(found, gaps, strict=True) if verdict in (-1, 1)]
    assert mean(strong) > mean(weak) + 1


def test_position_and_length_bias_show():
    def first(annotator: str) -> float:
        decided = [verdict for verdict in verdicts(annotator) if verdict]
        return mean(verdict > 0 for verdict in decided)

    assert first("ada") == pytest.approx(0.5, abs=0.03)
    assert first("cleo") > first("ada") + 0.04

    def longer(annotator: str) -> float:
        sides = zip(verdicts(annotator), PAIRS, strict=True)
        return mean((v > 0) == (len(a.split()) > len(b.split())) for v, (_, (a, b)) in sides if v)

    assert longer("cleo") > 0.5


def test_a_verdict_depends_on_its_arguments_alone():
    once = verdicts("ben")
    again = {task_id(t.prompt, shown): judge("ben", 0, task_id(t.prompt, shown), t.facts, shown)
             for t, shown in reversed(PAIRS)}  # fmt: skip
    assert [again[task_id(t.prompt, shown)] for t, shown in PAIRS] == once
    assert verdicts("ben", seed=1) != once
    ticket, shown = PAIRS[0]
    turned = [judge("ada", seed, "task", ticket.facts, shown[::-1]) for seed in range(200)]
    straight = [judge("ada", seed, "task", ticket.facts, shown) for seed in range(200)]
    assert mean(v or 0 for v in straight) == pytest.approx(-mean(v or 0 for v in turned), abs=0.5)


def test_wrong_arguments_are_refused():
    with pytest.raises(DataError, match="ada, ben, cleo"):
        judge("zoe", 0, "task", FACTS, [GOOD, GOOD])
    with pytest.raises(DataError, match="compare two"):
        judge("ada", 0, "task", FACTS, [GOOD])


def test_the_page_is_what_the_world_says():
    page = (Path(rubric.__file__).parent / "README.md").read_text("utf-8")
    assert samples() in page, "run `python -m stages.helpdesk` and put what it prints into the README"
    for name, who in ANNOTATORS.items():
        cells = name, who.noise, who.tie, who.position, who.length, who.careless, who.skip
        assert f"| {' | '.join(map(str, cells))} |" in page
    for problem, truth in PROBLEMS.items():
        assert f"| {problem} | {truth.remedy} | {'yes' if truth.sorry else 'no'} |" in page
    assert f"{len(PROBLEMS)} kinds" in page and f"{len(PRODUCTS)} products" in page
