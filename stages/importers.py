"""Rows in the shapes people have them, read as prompts and replies.

    {"prompt", "chosen", "rejected"}       preference (TRL's recommended form)
    {"chosen", "rejected"}                 preference with the prompt inside both sides; HH-RLHF transcripts
    {"prompt", "completion", "label"}      unpaired preference: was the completion liked?
    {"prompt", "completion"}               demonstration
    {"messages"}, {"messages", "label"}    the same as a conversation whose last turn is the reply
    {"text"}                               plain text
    {"prompt"}                             prompt only

A cell is a text or a list of messages ({"role", "content"}). Other columns are not read. One file, one shape.
What cannot be read (bad JSON, a missing column, a wrong type) is for the user to mend: DataError with file,
row and column. What can be read but not used (an empty reply, no common prompt) is `Dropped`, with a reason.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, PlainValidator, StrictStr

from annotate import records
from annotate.records import DataError, Message
from stages.turns import (
    Turn,
    Unusable,
    as_messages,
    as_prompt,
    as_reply,
    split_turns,
    split_words,
    transcript,
)

Place = tuple[str, int]
"""File and row number, from 1."""


@dataclass(frozen=True)
class Example:
    """What a row says. A demonstration has only `chosen`, a disliked reply only `rejected`, a text `text`."""

    prompt: tuple[Message, ...] = ()
    chosen: str | None = None
    rejected: str | None = None
    text: str | None = None
    labelled: bool = False
    """One reply with a verdict of its own: liked (`chosen`) or not (`rejected`)."""

    @property
    def words(self) -> int:
        """Of the prompt and the longer reply."""
        asked = sum(len(message.content.split()) for message in self.prompt)
        return asked + max(len((text or "").split()) for text in (self.chosen, self.rejected, self.text))


@dataclass(frozen=True)
class Dropped:
    reason: str


def _cell(value: Any) -> str | list[Turn] | None:
    if value is None or isinstance(value, str):
        return value
    problem = "expected a text, or a list of messages with `role` and `content`"
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise ValueError(problem)
    turns = [Turn(turn.get("role"), turn.get("content", "")) for turn in value]
    if not all(isinstance(role, str) and isinstance(content, str | None) for role, content in turns):
        raise ValueError(problem)
    return [Turn(role, (content or "").strip()) for role, content in turns]


Cell = Annotated[Any, PlainValidator(_cell)]


class Columns(BaseModel):
    model_config = ConfigDict(extra="allow")

    prompt: Cell = None
    completion: Cell = None
    chosen: Cell = None
    rejected: Cell = None
    messages: Cell = None
    label: Any = None
    text: StrictStr | None = None


def read(path: str | Path) -> Iterator[tuple[int, Example | Dropped]]:
    """(row number, what it says) of every row of a JSON-lines file (.gz or not). Raises DataError."""
    if Path(path).is_dir():
        raise DataError(f"{path}: is a folder; name the JSON-lines files in it")
    shape: tuple[str, ...] | None = None
    for number, line in records.lines(path):
        if number == 1 and line.lstrip().startswith("["):
            raise DataError(f"{path}: holds one JSON array; write one row a line (jq -c '.[]' does it)")
        columns = records.parse(path, number, line, Columns)
        shape = shape or _shape(path, number, columns)
        _check(path, number, columns, shape)
        try:
            yield number, SHAPES[shape](columns)
        except Unusable as reason:
            yield number, Dropped(str(reason))


def paired(examples: Iterable[tuple[Place, Example]]) -> Iterator[tuple[tuple[Place, ...], Example]]:
    """A liked and a disliked reply to one prompt make a comparison; those without a partner come last."""
    waiting: dict[tuple[tuple[Message, ...], bool], list[tuple[Place, Example]]] = {}
    for place, example in examples:
        liked = example.chosen is not None
        if not example.labelled:
            yield (place,), example
        elif partners := waiting.get((example.prompt, not liked)):
            other, partner = partners.pop(0)
            yes, no = (example, partner) if liked else (partner, example)
            yield (other, place), Example(example.prompt, yes.chosen, no.rejected)
        else:
            waiting.setdefault((example.prompt, liked), []).append((place, example))
    for alone in waiting.values():
        yield from (((place,), example) for place, example in alone)


def unread(path: str | Path) -> list[str]:
    """Columns of the first row that are not read."""
    first = next(records.lines(path), None)
    return sorted(records.parse(path, first[0], first[1], Columns).model_extra or {}) if first else []


def _preference(columns: Columns) -> Example:
    chosen, rejected = columns.chosen, columns.rejected
    whole = all(isinstance(side, list) and len(side) > 1 for side in (chosen, rejected))
    if whole and isinstance(columns.prompt, str):  # a title, beside conversations that hold the prompt
        return _implicit(columns)
    return _example(as_prompt(columns.prompt), as_reply(chosen), as_reply(rejected))


def _implicit(columns: Columns) -> Example:
    chosen, rejected = columns.chosen, columns.rejected
    if chosen == rejected:
        raise Unusable("chosen and rejected are the same")
    turns = [transcript(side) if isinstance(side, str) else side for side in (chosen, rejected)]
    if turns[0] is not None and turns[1] is not None:
        asked, chosen, rejected = split_turns(turns[0], turns[1])
        return _example(as_messages(asked), chosen, rejected)
    if isinstance(chosen, str) and isinstance(rejected, str):
        start, chosen, rejected = split_words(chosen, rejected)
        return _example(as_prompt(start), chosen, rejected)
    raise Unusable("one side is a text, the other a conversation")


def _demonstration(columns: Columns) -> Example:
    return _judged(columns, as_prompt(columns.prompt), as_reply(columns.completion))


def _conversation(columns: Columns) -> Example:
    turns = columns.messages if isinstance(columns.messages, list) else transcript(columns.messages) or []
    return _judged(columns, as_messages(turns[:-1]), as_reply(turns[-1:]))


def _judged(columns: Columns, prompt: tuple[Message, ...], reply: str) -> Example:
    if columns.label is None:
        return _example(prompt, reply, None)
    example = _example(prompt, reply, None) if columns.label else _example(prompt, None, reply)
    return replace(example, labelled=True)


def _text(columns: Columns) -> Example:
    text = (columns.text or "").strip()
    if not text:
        raise Unusable("empty text")
    return Example(text=text)


def _prompt_only(columns: Columns) -> Example:
    return _example(as_prompt(columns.prompt), None, None)


SHAPES: dict[tuple[str, ...], Callable[[Columns], Example]] = {
    ("prompt", "chosen", "rejected"): _preference,
    ("chosen", "rejected"): _implicit,
    ("prompt", "completion", "label"): _demonstration,
    ("prompt", "completion"): _demonstration,
    ("messages", "label"): _conversation,
    ("messages",): _conversation,
    ("text",): _text,
    ("prompt",): _prompt_only,
}
"""Most telling first: a row has the first shape whose columns it has."""


def _shape(path: str | Path, number: int, columns: Columns) -> tuple[str, ...]:
    for shape in SHAPES:
        if columns.model_fields_set.issuperset(shape):
            return shape
    known = "; ".join(", ".join(shape) for shape in SHAPES)
    found = ", ".join(sorted(columns.model_fields_set)) or "none"
    raise DataError(f"{path}, row {number}: has the columns {found}; needs those of one known shape: {known}")


def _check(path: str | Path, number: int, columns: Columns, shape: tuple[str, ...]) -> None:
    """Every column of the shape is there, and none that would say more is left over or misspelt."""
    where = f"{path}, row {number}"
    for name in shape:
        if getattr(columns, name) is None:
            raise DataError(f"{where}, {name}: missing or null; every row needs {', '.join(shape)}")
    if "label" in shape and not isinstance(columns.label, bool):
        raise DataError(
            f"{where}, label: {columns.label!r}; write true (liked) or false, or take the column out"
        )
    if "chosen" in shape or shape == ("text",):
        return
    verdicts = ("chosen", "rejected", "completion", "label")
    for name in verdicts:
        if name not in shape and name in columns.model_fields_set:
            raise DataError(
                f"{where}: `{name}` does not go with {', '.join(shape)} alone; is a column missing?"
            )
    for name in columns.model_extra or {}:
        if near := get_close_matches(name, verdicts, 1, 0.8):
            raise DataError(f"{where}: unknown column `{name}`; did you mean `{near[0]}`?")


def _example(prompt: tuple[Message, ...], chosen: str | None, rejected: str | None) -> Example:
    chosen, rejected = (reply if reply is None else reply.strip() for reply in (chosen, rejected))
    if chosen == "" or rejected == "":
        raise Unusable("empty reply")
    if chosen is not None and chosen == rejected:
        raise Unusable("chosen and rejected are the same")
    return Example(prompt, chosen, rejected)
