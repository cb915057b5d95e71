"""Prepare: from raw rows, or the helpdesk's own world, to records with an id, a split and a use.

    prefloop prepare configs/hh.yaml prepare.data=comparisons.jsonl.gz

Reads    data               "helpdesk", or JSON-lines files (.gz or not) in the shapes of stages/importers.py
Writes   records.jsonl      every prompt once; with a demonstration where its use is sft
         judgements.jsonl   people's comparisons of two replies, where the source has any
         corpus.txt         plain text for a base model, of the training split; a blank line between documents
         card.json, .md     the data card: counts, lengths, and what was dropped, with reasons and row numbers

Split and use are drawn by the hash of the prompt's opening, up to the first turn of the user: they stay when
rows are added or reordered, and a conversation never meets its own continuation in another split.
Training never sees one prompt in two uses: a comparison whose prompt is for sft gives its chosen reply as a
demonstration and no judgement, one whose prompt is for policy only the prompt. In validation and test, which
train nothing, every comparison is kept whatever its use.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, model_validator

from annotate.records import Judgement, Message, Record, Row, Split, Use, draw, prompt_id, write
from stages import datacard
from stages.config import Reads, StageConfig, UserError
from stages.importers import Dropped, Example, Place, paired, read
from stages.run import Run

VERSION = 1

Source = Annotated[str, Reads("")]
Share = Annotated[float, Field(ge=0, le=1)]


class Config(StageConfig):
    data: Literal["helpdesk"] | Source | list[Source] = "helpdesk"
    """`helpdesk`, or one or several files of raw rows."""
    seed: int = 0
    """Of the helpdesk's world, so that experiments with other seeds share it."""
    prompts: int = Field(default=4000, ge=1)
    """Helpdesk only: distinct prompts to make."""
    documents: int = Field(default=4000, ge=0)
    """Helpdesk only: documents of shop text for the base model."""
    rows: int | None = Field(default=None, ge=1)
    """Files only: read at most this many rows of each. None: all."""
    max_words: int | None = Field(default=None, ge=1)
    """Files only: rows whose prompt and longer reply have more words are dropped and counted."""
    split: dict[Literal["validation", "test"], Share] = {"validation": 0.1, "test": 0.1}
    """Share of the prompts; the rest trains."""
    use: dict[Use, Share] = {"sft": 0.3, "preference": 0.4, "policy": 0.3}
    """Share of the prompts, in every split; adds up to 1."""

    @model_validator(mode="after")
    def _shares(self) -> "Config":
        if sum(self.split.values()) >= 1:
            raise ValueError("split: validation and test take everything; leave some to train")
        if abs(sum(self.use.values()) - 1) > 1e-9:
            raise ValueError(f"use: the shares add up to {sum(self.use.values()):g}, not 1")
        return self

    def row(self, prompt: Sequence[Message], facts: dict[str, Any] | None = None) -> Row:
        """The prompt with its id, split and use."""
        opening = prompt_id(prompt[: 1 + [message.role for message in prompt].index("user")])
        splits: dict[Split, float] = {name: share for name, share in self.split.items()}
        splits["train"] = 1 - sum(self.split.values())
        split = _pick(draw(opening, "split"), splits)
        use = _pick(draw(opening, "use"), self.use)
        return Row(id=prompt_id(prompt), split=split, use=use, prompt=list(prompt), facts=facts or {})


Kind = TypeVar("Kind", bound=str)


def _pick(number: float, shares: Mapping[Kind, float]) -> Kind:
    """`number` in [0, 1) falls on one of the shares, in alphabetical order, which no file's order changes."""
    names = [name for name in sorted(shares) if shares[name] > 0]
    ends = accumulate(shares[name] for name in names)
    return next((name for name, end in zip(names, ends, strict=True) if number < end), names[-1])


@dataclass
class Prepared:
    records: dict[str, Record] = field(default_factory=dict)
    """By prompt id, in order of first appearance."""
    judgements: list[Judgement] = field(default_factory=list)
    corpus: list[str] = field(default_factory=list)
    read: int = 0
    """Raw rows; each of them is kept or in `dropped`."""
    dropped: dict[str, list[Place]] = field(default_factory=dict)
    """Reason -> rows."""

    def drop(self, reason: str, *places: Place) -> None:
        self.dropped.setdefault(reason, []).extend(places)


def main(config: Config, run: Run) -> None:
    sources: list[dict[str, Any]]
    if config.data == "helpdesk":
        prepared, sources = from_helpdesk(config), [{"world": "helpdesk", "seed": config.seed}]
    else:
        paths = [config.data] if isinstance(config.data, str) else config.data
        prepared, sources = from_files(config, paths), [datacard.source(path) for path in paths]
    if not prepared.records and not prepared.corpus:
        why = ", ".join(f"{reason}: {len(rows)}" for reason, rows in prepared.dropped.items())
        raise UserError(f"prepare.data: no usable row among {prepared.read} ({why or 'the source is empty'})")

    records = list(prepared.records.values())
    write(run.output("records.jsonl"), records)
    write(run.output("judgements.jsonl"), prepared.judgements)
    run.output("corpus.txt").write_text("\n\n".join(prepared.corpus) + "\n", encoding="utf-8")
    rows = datacard.account(prepared.read, prepared.dropped)
    card = datacard.describe(sources, rows, records, prepared.judgements, prepared.corpus)
    run.output("card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    run.output("card.md").write_text(datacard.render(card), encoding="utf-8")
    run.record(**card["wrote"], rows={name: card["rows"][name] for name in ("read", "kept", "dropped")})


def from_helpdesk(config: Config) -> Prepared:
    from stages.helpdesk.world import corpus, demonstration, tickets

    prepared = Prepared(read=config.prompts, corpus=list(corpus(config.seed, config.documents)))
    for ticket in tickets(config.seed, config.prompts):
        row = config.row(ticket.prompt, ticket.facts)
        add_record(prepared, row, demonstration(ticket, config.seed))
    return prepared


def from_files(config: Config, paths: Sequence[str]) -> Prepared:
    prepared = Prepared()
    for places, example in paired(usable(config, paths, prepared)):
        if example.text is not None:
            prepared.corpus.append(one_block(example.text))
            continue
        row = config.row(example.prompt)
        news = [add_record(prepared, row, example.chosen), add_judgement(prepared, row, example)]
        if not any(news):
            prepared.drop("its prompt is there already, and its replies have no use", *places)
        elif row.split == "train":
            prepared.corpus += documents(row, example)
    return prepared


def usable(config: Config, paths: Sequence[str], prepared: Prepared) -> Iterator[tuple[Place, Example]]:
    """The rows of all files whose content can be used, each once; the others are counted as dropped."""
    seen: set[Example] = set()
    for path, name in zip(paths, datacard.names(paths), strict=True):
        for number, found in islice(read(path), config.rows):
            prepared.read += 1
            if isinstance(found, Dropped):
                prepared.drop(found.reason, (name, number))
            elif config.max_words is not None and found.words > config.max_words:
                prepared.drop(f"more than {config.max_words} words", (name, number))
            elif found in seen:
                prepared.drop("exact duplicate of an earlier row", (name, number))
            else:
                seen.add(found)
                yield (name, number), found


def add_record(prepared: Prepared, row: Row, reply: str | None) -> bool:
    """Whether this brought a new prompt, or the demonstration that a known one lacked."""
    demonstration = reply if row.use == "sft" else None
    known = prepared.records.get(row.id)
    if known and (known.completion is not None or demonstration is None):
        return False
    prepared.records[row.id] = Record(**dict(row), completion=demonstration)
    return True


def add_judgement(prepared: Prepared, row: Row, example: Example) -> bool:
    chosen, rejected = example.chosen, example.rejected
    if chosen is None or rejected is None or (row.split == "train" and row.use != "preference"):
        return False
    completions = in_drawn_order(row, chosen, rejected)
    prepared.judgements.append(
        Judgement(
            **dict(row),
            completions=completions,
            annotator="unknown",
            kind="person",
            round="given",
            preference=1 if completions[0] == chosen else -1,  # the source knows no strength
        )
    )
    return True


def in_drawn_order(row: Row, *replies: str | None) -> list[str]:
    """In an order that says nothing of the verdict."""
    return sorted((reply for reply in replies if reply is not None), key=lambda reply: draw(row.id, reply))


def documents(row: Row, example: Example) -> list[str]:
    """Plain text of one example: the prompt with its first reply, and the second alone; no verdict shows."""
    prompt = "\n".join(message.content for message in row.prompt)
    replies = in_drawn_order(row, example.chosen, example.rejected)
    return [one_block("\n".join([prompt, *replies[:1]])), *map(one_block, replies[1:])]


def one_block(text: str) -> str:
    """Without blank lines, which separate documents."""
    return "\n".join(line for line in text.splitlines() if line.strip())


if __name__ == "__main__":
    from stages.cli import launch

    launch("prepare")
