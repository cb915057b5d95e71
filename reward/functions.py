"""Rewards of sampled replies: functions, reward models, or a weighted list of both.

A function is called with keywords: `prompts` (text or messages), `completions` (text), `prompt_ids`,
`completion_ids` and every further column of the dataset, lists of one entry a reply; it is given those
that it names, or all if it takes `**kwargs`. It returns for each reply a number, or a list of one a token.
"""

import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from annotate.records import DataError, Message
from reward.batch import Example
from reward.model import load_reward, load_tokenizer, same_vocabulary
from reward.tokens import completion_ids as ids_of_completion
from reward.tokens import prompt_ids as ids_of_prompt
from reward.tokens import rewards

Values = list[float] | list[list[float]]


class RewardError(DataError):
    """A reward that cannot be used: which function, for which prompt, what it gave."""


@dataclass(frozen=True)
class Scores:
    """What the functions say of R replies."""

    totals: list[float]
    """Weighted sums; a list of a token each counts with its sum."""
    scalars: list[float]
    """The part of the totals that came as one number a reply."""
    tokens: list[list[float]] | None
    """The part that came token by token, weighted; None if no function gave lists."""
    by_function: dict[str, list[float]]
    """Unweighted, for the log."""


class Rewards:
    """Calls the reward functions and adds up what they say.

    funcs                one or several: a Python function, a sequence-classification model with one label, or
                         the path or hub id of such a model
    processing_class     the policy's tokenizer
    weights              one for each function; 1 if left out
    processing_classes   tokenizers of the models, None for functions; left out, they are loaded beside them

    A model of the policy's own vocabulary and chat template reads the ids that were sampled, the stop token
    included; another gets the text, rendered by its own template.
    """

    def __init__(
        self,
        funcs: Any,
        processing_class: Any,
        weights: Sequence[float] | None = None,
        processing_classes: Any = None,
    ):
        given = list(funcs) if isinstance(funcs, list | tuple) else [funcs]
        tokenizers = (
            processing_classes if isinstance(processing_classes, list | tuple) else [processing_classes]
        )
        if processing_classes is None:
            tokenizers = [None] * len(given)
        for what, count in {"weights": weights, "processing classes": tokenizers}.items():
            if count is not None and len(count) != len(given):
                raise RewardError(f"{len(count)} {what} for {len(given)} reward functions: give one for each")
        self.weights = [1.0] * len(given) if weights is None else list(weights)
        self.calls: list[Callable[..., Values]] = []
        self.models: list[Any] = []
        """For each function its model, if it is one that reads the policy's tokens."""
        for one, tokenizer in zip(given, tokenizers, strict=True):
            call, model = _prepared(one, tokenizer, processing_class)
            self.calls.append(call)
            self.models.append(model)
        self.names = _distinct([_name(one) for one in given])

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        prompt_ids: Sequence[list[int]],
        completion_ids: Sequence[list[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> Scores:
        """RewardError where a function raises or gives what cannot be used."""
        given = {**columns, "prompts": prompts, "completions": completions}
        given |= {"prompt_ids": prompt_ids, "completion_ids": completion_ids}
        scalars = [0.0] * len(completions)
        tokens: list[list[float]] | None = None
        by_function = {}
        for name, call, weight in zip(self.names, self.calls, self.weights, strict=True):
            found = _checked(name, _called(name, call, given), prompts, completion_ids)
            if found and isinstance(found[0], list):
                tokens = tokens or [[0.0] * len(ids) for ids in completion_ids]
                tokens = [
                    [a + weight * b for a, b in zip(*rows, strict=True)]
                    for rows in zip(tokens, found, strict=True)
                ]
                by_function[name] = [math.fsum(row) for row in found]
            else:
                scalars = [a + weight * b for a, b in zip(scalars, found, strict=True)]  # type: ignore[operator]
                by_function[name] = found  # type: ignore[assignment]
        sums = [0.0] * len(scalars) if tokens is None else [math.fsum(row) for row in tokens]
        totals = [a + b for a, b in zip(scalars, sums, strict=True)]
        return Scores(totals, scalars, tokens, by_function)


class RunningScale:
    """Mean and standard deviation of all values seen, to bring rewards to mean 0 and deviation 1.

    Welford's update (Knuth, The Art of Computer Programming, volume 2, section 4.2.2).
    """

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def update(self, values: Sequence[float]) -> None:
        for value in values:
            self.count += 1
            before = value - self.mean
            self.mean += before / self.count
            self.squares += before * (value - self.mean)

    def __call__(self, values: Sequence[float]) -> list[float]:
        deviation = math.sqrt(self.squares / max(1, self.count))
        return [(value - self.mean) / (deviation + 1e-8) for value in values]

    def state_dict(self) -> dict[str, float]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, float]) -> None:
        vars(self).update(state)


def _prepared(one: Any, tokenizer: Any, of_policy: Any) -> tuple[Callable[..., Values], Any]:
    """(what to call, the model if it reads the policy's own tokens)."""
    model = one
    if isinstance(one, str | Path):
        model, own = load_reward(one)
        tokenizer = tokenizer or own
    elif not hasattr(one, "config"):
        if not callable(one):
            raise RewardError(f"reward function {one!r}: give a function, a model, or the path of a model")
        return _accepted(one), None
    if getattr(model.config, "num_labels", 1) != 1:
        raise RewardError(f"reward model {_name(one)} has {model.config.num_labels} labels: give one with 1")
    tokenizer = tokenizer or load_tokenizer(model.name_or_path)[0]
    model = model.requires_grad_(False).eval()
    if same_vocabulary(tokenizer, of_policy):
        return lambda prompt_ids, completion_ids, **_: _of_ids(model, prompt_ids, completion_ids), model
    return lambda prompts, completions, **_: _of_text(model, tokenizer, prompts, completions), None


def _accepted(function: Any) -> Callable[..., Values]:
    """The function, called with no other keywords than it takes."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return function  # type: ignore[no-any-return]
    names = {p.name for p in parameters}
    return lambda **given: function(**{name: value for name, value in given.items() if name in names})


def _of_ids(model: Any, prompts: Sequence[list[int]], replies: Sequence[list[int]]) -> list[float]:
    examples = [Example(prompt, (reply,)) for prompt, reply in zip(prompts, replies, strict=True)]
    return [score for (score,) in rewards(model, examples)]


def _of_text(model: Any, tokenizer: Any, prompts: Sequence[Any], replies: Sequence[str]) -> list[float]:
    texts = [
        [Message(role="user", content=p)] if isinstance(p, str) else [_message(m) for m in p] for p in prompts
    ]
    ids = [ids_of_prompt(tokenizer, messages) for messages in texts]
    return _of_ids(model, ids, [ids_of_completion(tokenizer, reply) for reply in replies])


def _message(given: Any) -> Message:
    return given if isinstance(given, Message) else Message(role=given["role"], content=given["content"])


def _called(name: str, call: Callable[..., Values], given: Mapping[str, Any]) -> Any:
    try:
        return call(**given)
    except Exception as error:  # of any kind: the function is the user's
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        count = len(given["completions"])
        raise RewardError(f"reward function {name} failed on {count} replies: {reason}") from error


def _checked(name: str, found: Any, prompts: Sequence[Any], replies: Sequence[list[int]]) -> Values:
    found = found.tolist() if hasattr(found, "tolist") else found
    if not isinstance(found, Sequence) or len(found) != len(replies):
        count = len(found) if isinstance(found, Sequence) else repr(found)
        raise RewardError(
            f"reward function {name} returned {count} for {len(replies)} replies: one is due for each"
        )
    lists = [isinstance(value, Sequence) and not isinstance(value, str) for value in found]
    if any(lists) and not all(lists):
        at = lists.index(not lists[0])
        _refuse(name, prompts[at], found[at], "numbers and lists cannot be mixed")
    for value, prompt, ids in zip(found, prompts, replies, strict=True):
        if lists[0] and len(value) != len(ids):
            _refuse(
                name, prompt, f"{len(value)} numbers", f"the reply has {len(ids)} tokens: one is due for each"
            )
        for number in value if lists[0] else [value]:
            if not isinstance(number, int | float) or not math.isfinite(number):
                _refuse(name, prompt, number, "a finite number is due")
    return [[float(x) for x in v] for v in found] if any(lists) else [float(v) for v in found]


def _refuse(name: str, prompt: Any, value: Any, why: str) -> None:
    text = prompt if isinstance(prompt, str) else _message(prompt[-1]).content
    short = text if len(text) <= 80 else text[:80] + " ..."
    raise RewardError(f"reward function {name} gave {value!r} for the prompt {short!r}: {why}")


def _name(one: Any) -> str:
    if isinstance(one, str | Path):
        return Path(one).name
    if hasattr(one, "config"):
        return Path(getattr(one, "name_or_path", "")).name or type(one).__name__
    return str(getattr(one, "__name__", type(one).__name__))


def _distinct(names: list[str]) -> list[str]:
    counts, seen = Counter(names), Counter[str]()
    made = []
    for name in names:
        seen[name] += 1
        made.append(f"{name}-{seen[name]}" if counts[name] > 1 else name)
    return made
