"""Print samples of the world, as they stand in README.md: `python -m stages.helpdesk`."""

from stages.helpdesk.rubric import MAXIMUM, score
from stages.helpdesk.world import corpus, demonstration, tickets


def samples() -> str:
    """Twelve tickets, each with a demonstration and its score, and three pieces of shop text, in Markdown."""
    lines = []
    for ticket in tickets(seed=1, count=12):
        reply = demonstration(ticket, seed=1)
        total, parts = (found := score(ticket.facts, reply)).total, found.parts
        why = ", ".join(f"{part} {points:+g}" for part, points in parts.items() if points)
        lines += [f"> {ticket.prompt[0].content}", "", reply, ""]
        lines += [f"*{ticket.facts['problem']}: {total:g} of {MAXIMUM:g}" + f" ({why})*" * bool(why), ""]
    lines += [line for text in corpus(seed=1, documents=3) for line in ("---", "", text, "")]
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    print(samples())
