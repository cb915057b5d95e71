"""The rows that stages hand to one another: JSON lines, validated, with a schema version.

    Record      prepare    a prompt, its split and use, and perhaps a demonstration
    Completion  sample     one sampled reply with its token ids and log-probs
    Item        sample     one prompt with the replies to judge
    Judgement   collect    what one annotator said of one item
    Evaluation  evaluate   one reply of one policy with everything measured on it

Identity: `id` is a hash of the prompt alone, so that splits, uses and intervals cluster by prompt; `task` is
a hash of the prompt and the completions, so that a judgement survives every change upstream of those texts.
"""

import gzip
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import IO, Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

Split = Literal["train", "validation", "test"]
Use = Literal["sft", "preference", "policy"]
Kind = Literal["person", "model", "simulated"]
Role = Literal["annotator", "researcher"]
Text = Annotated[str, StringConstraints(min_length=0)]
"""Any text that can be written as UTF-8: a limit, even this one, makes pydantic refuse lone surrogates."""


class DataError(ValueError):
    """A row or file that cannot be used. The message names file, row and field, and says what to do."""


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["system", "user", "assistant"]
    content: Text


class Row(BaseModel):
    """Common to all rows; unknown fields are refused, so that a misspelt one cannot be lost in silence."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    id: str
    split: Split
    use: Use
    prompt: list[Message] = Field(min_length=1)
    facts: dict[str, Any] = {}
    """What the world knows of the prompt (names, products, group); never shown to a model or an annotator."""


class Record(Row):
    completion: Text | None = None
    """A demonstration; None where there is only a prompt."""


class Completion(Row):
    policy: str
    """Digest of the policy that wrote it."""
    completion: Text
    tokens: list[int]
    """Token ids as sampled, the stop token included when there was one."""
    logprobs: list[float]
    """Natural log-probability of each token in the distribution it was drawn from."""
    stopped: bool
    """Ended by its own stop token, not by the length limit."""


class Item(Row):
    completions: list[Text] = Field(min_length=1)
    policies: list[str] = []
    """Who wrote each completion; never sent to the browser."""
    priority: float | None = Field(default=None, allow_inf_nan=False, exclude_if=lambda value: value is None)
    """High is judged first, None last, ties by the draw. Not in the file where it is None."""

    @property
    def task(self) -> str:
        return task_id(self.prompt, self.completions)


class Judgement(Row):
    """`preference` is -3..3: positive says that the FIRST completion is better, 0 is a tie, None no verdict.

    For more than two `ranking` gives each one's rank (1 = best, equal numbers = tie).
    """

    completions: list[Text] = Field(min_length=1)
    annotator: str
    kind: Kind
    round: str
    preference: int | None = Field(default=None, ge=-3, le=3)
    ranking: list[int] | None = None
    rating: int | None = Field(default=None, ge=1)
    """Of a single completion; 1 = worst."""
    attributes: dict[str, int] = {}
    """Name -> preference, or grade of a single completion."""
    flags: dict[str, list[int]] = {}
    """Name -> indices of the completions that were flagged."""
    rationale: Text | None = None

    @model_validator(mode="after")
    def _one_verdict(self) -> Self:
        if self.preference is not None and len(self.completions) != 2:
            raise ValueError("preference is for two completions; use ranking for more")
        if self.ranking is not None and len(self.ranking) != len(self.completions):
            raise ValueError("ranking needs one rank for each completion")
        if self.rating is not None and len(self.completions) != 1:
            raise ValueError("rating is for a single completion")
        return self

    def pairs(self) -> list["Judgement"]:
        """What it says of two completions each: itself, or every pair of a ranking (Ouyang et al. 2022, 3.5).

        Ranks do not tell how much better, so the better of a pair gets 2, the middle of the scale.
        """
        if self.ranking is None:
            return [self] if len(self.completions) == 2 else []
        of_all: dict[str, Any] = {"ranking": None, "attributes": {}, "flags": {}}
        return [
            self.model_copy(
                update=of_all
                | {"completions": [self.completions[i], self.completions[j]], "preference": 2 * sign}
            )
            for i, j, sign in ranked_pairs(self.ranking)
        ]

    @property
    def task(self) -> str:
        return task_id(self.prompt, self.completions)


class Evaluation(Row):
    policy: str
    """Name of the row in the table (sft, dpo, best-of-8 (rm) ...)."""
    completion: Text
    length: int
    """Tokens, the stop token included."""
    stopped: bool
    gold: float | None = None
    """Rubric score; None in a world without a known truth."""
    reward: float | None = None
    """Reward-model score."""
    kl: float | None = None
    """log pi(y|x) - log pi_sft(y|x), nats per reply; its mean over samples is the k1 estimate of the KL."""
    win: float | None = None
    """Against the SFT reply to the same prompt by gold: 1 win, 0.5 tie, 0 loss."""
    repetition: float
    """Share of 4-grams of words that occurred earlier in the same reply."""
    base_loss: float | None = None
    """Mean loss per token of the base model on this reply, nats."""
    lexicon: float | None = None
    """Share of words that are in the world's lexicon."""


R = TypeVar("R", bound=BaseModel)


def ranked_pairs(ranking: Sequence[int]) -> list[tuple[int, int, int]]:
    """(i, j, sign) for every two of the ranked: 1 where i is better than j, -1 where j is, 0 for a tie."""
    return [
        (i, j, (ranking[i] < ranking[j]) - (ranking[i] > ranking[j]))
        for i, j in combinations(range(len(ranking)), 2)
    ]


def prompt_id(prompt: Sequence[Message]) -> str:
    """Hash of the prompt's messages, 16 hex digits."""
    return _digest([m.model_dump() for m in prompt])


def task_id(prompt: Sequence[Message], completions: Sequence[str]) -> str:
    """Hash of the prompt and the completions in their canonical order, 16 hex digits."""
    return _digest([[m.model_dump() for m in prompt], list(completions)])


def draw(key: str, *names: str | int) -> float:
    """A number in [0, 1) that depends on its arguments alone: for splits, uses and simulated choices."""
    text = "\x1f".join([key, *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") / 2**56


def read(path: str | Path, row: type[R]) -> list[R]:
    """All rows of a JSON-lines file (.gz or not). Raises DataError with file, row number and field."""
    return [parse(path, number, text, row) for number, text in lines(path)]


def lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """(row number from 1, text) of every line that is not blank."""
    try:
        with _open(path, "rt") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    yield number, text
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as text ({error}); is the file complete?") from None


def parse(path: str | Path, number: int, text: str, row: type[R]) -> R:
    try:
        return row.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the whole row"
        raise DataError(f"{path}, row {number}, {field}: {first['msg']}") from None


def write(path: str | Path, rows: Iterable[BaseModel]) -> int:
    """Write rows so that the file is either absent or whole, and the same rows give the same bytes."""
    path = Path(path)
    draft = path.with_name(path.name + ".draft")
    count = 0
    with _open(draft, "wt", gz=path.suffix == ".gz") as file:
        for row in rows:
            file.write(row.model_dump_json(exclude_defaults=False) + "\n")
            count += 1
    os.replace(draft, path)
    return count


def _open(path: str | Path, mode: Literal["rt", "wt"], gz: bool | None = None) -> IO[str]:
    if gz if gz is not None else Path(path).suffix == ".gz":
        if mode == "wt":  # no file name and no time in the header: the same rows give the same bytes
            return io.TextIOWrapper(_Gzip(path), encoding="utf-8", newline="\n")
        return gzip.open(path, mode, encoding="utf-8")
    return open(path, mode, encoding="utf-8", newline="\n" if mode == "wt" else None)


class _Gzip(gzip.GzipFile):
    """A gzip file whose header holds neither name nor time; closing it closes the file beneath."""

    def __init__(self, path: str | Path):
        self._raw = Path(path).open("wb")  # noqa: SIM115 (closed below)
        super().__init__("", "wb", fileobj=self._raw, mtime=0)

    def close(self) -> None:
        super().close()
        self._raw.close()


def _digest(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
