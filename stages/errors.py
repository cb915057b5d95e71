"""Errors that the user can mend, and what to say of a word that is not known."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(RuntimeError):
    """Something the user can mend. The message is one line: what is wrong, where, what to do."""


class SettingsError(UserError):
    """The experiment file or an override is wrong; nothing has been started."""


def suggest(word: str, known: Iterable[str]) -> str:
    """What to say after "unknown": the nearest known word, or all of them if they are few."""
    known = list(known)
    near = get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]}?"
    return f"there are: {', '.join(known)}" if len(known) <= 20 else "none of its names is near"
