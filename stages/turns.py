"""Conversations, and where their prompt ends: reading raw rows, the part about texts and not columns."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from annotate.records import Message


class Turn(NamedTuple):
    role: str
    content: str


class Unusable(Exception):
    """A row whose content cannot be used; the message is the reason, the same for every such row."""


def transcript(text: str) -> list[Turn] | None:
    """The turns of an HH-RLHF transcript ("Human: … Assistant: …", paragraphs); None when it is not one."""
    before, *parts = re.split(r"(?:\A|\n\n)(Human|Assistant):", text)
    if before.strip() or not parts:
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    return [Turn(roles[role], said.strip()) for role, said in zip(parts[::2], parts[1::2], strict=True)]


def split_turns(chosen: Sequence[Turn], rejected: Sequence[Turn]) -> tuple[list[Turn], str, str]:
    """(prompt, chosen reply, rejected reply) of two conversations that differ in their last turn alone."""
    common = _common(chosen, rejected)
    if common == 0 or not len(chosen) == len(rejected) == common + 1:
        raise Unusable("no common prompt: the sides differ before their last turn")
    return list(chosen[:common]), as_reply(chosen[common:]), as_reply(rejected[common:])


def split_words(chosen: str, rejected: str) -> tuple[str, str, str]:
    """(prompt, reply, reply) of two texts; the prompt is their common start, in whole words."""
    prompt = chosen[: _common(chosen, rejected)]
    if prompt and not prompt[-1].isspace():  # the sides may part inside a word: it belongs to the replies
        prompt = prompt[: -len(prompt.split()[-1])]
    if not prompt.strip():
        raise Unusable("no common prompt: the sides differ from their first word")
    return prompt, chosen[len(prompt) :], rejected[len(prompt) :]


def _common(a: Sequence[Any], b: Sequence[Any]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def as_prompt(cell: str | list[Turn]) -> tuple[Message, ...]:
    if isinstance(cell, list):
        return as_messages(cell)
    turns = transcript(cell)
    if turns is None:
        return as_messages([Turn("user", cell.strip())])
    if turns[-1] == Turn("assistant", ""):  # "… Assistant:" waits for the reply
        turns = turns[:-1]
    return as_messages(turns)


def as_messages(turns: Sequence[Turn]) -> tuple[Message, ...]:
    """user, assistant, … user, after an optional system message: what every chat template can render."""
    roles = [turn.role for turn in turns]
    if unknown := sorted(set(roles) - {"system", "user", "assistant"}):
        raise Unusable(f"unknown role {', '.join(unknown)}")
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken or spoken[-1] != "user":
        raise Unusable("the prompt does not end with the user's turn")
    if spoken != ["user", "assistant"] * (len(spoken) // 2) + ["user"]:
        raise Unusable("the turns of user and assistant do not alternate")
    if not all(turn.content for turn in turns):
        raise Unusable("empty turn in the prompt")
    return tuple(Message.model_validate({"role": role, "content": said}) for role, said in turns)


def as_reply(cell: str | Sequence[Turn]) -> str:
    if not isinstance(cell, str):
        if len(cell) != 1 or cell[0].role != "assistant":
            raise Unusable("the reply is not one turn of the assistant")
        cell = cell[0].content
    return cell
