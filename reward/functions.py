"""Reward functions: what a trainer calls to score sampled completions, in the conventions of TRL's trainers.

    rewards = Rewards([brevity, "runs/quickstart/rm/0a1b/model"], tokenizer, weights=[0.1, 1.0])
    scores = rewards(prompts, completions, prompt_ids, completion_ids, {"product": products})

A function is called once for all completions, by keyword, and returns for each of them a number or a list
with one number for each token. A reward model is one function among others (`reward.model_reward`).
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import Path
from traceback import extract_tb
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from reward.model_reward import ModelReward, Prompt, RewardError, quoted, shortened
from reward.parallel import once
from reward.scaling import RunningScale

__all__ = ["Prompt", "RewardError", "Rewards", "RunningScale", "Scores"]

RewardFunction = Callable[..., Any] | nn.Module | str | Path
"""A function, a sequence-classification model with one label, or a folder or hub id of one."""


@dataclass(frozen=True)
class Scores:
    """Rewards of N completions."""

    totals: list[float]
    """(N,) weighted sum of the functions; a list of numbers per token counts with its sum."""
    tokens: list[list[float]] | None
    """Weighted reward of every token, as long as the completion; None where no function gave lists."""
    scalars: list[float]
    """(N,) the part of `totals` that functions gave as one number: the reward of the last token."""
    by_function: dict[str, list[float]]
    """(N,) for each function, without its weight."""


class Rewards:
    """Calls every reward function on the same completions and adds up what they return.

    `processing_class` is the policy's tokenizer; `processing_classes`, in the order of `funcs`, are those of
    the reward models, None for what has none or lies beside the model. Weights are 1 unless given.

    Raises RewardError, in one line, for what cannot be used: a model, a weight, what a function returned.
    """

    def __init__(
        self,
        funcs: RewardFunction | Sequence[RewardFunction],
        processing_class: PreTrainedTokenizerBase,
        weights: Sequence[float] | None = None,
        processing_classes: PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase | None] | None = None,
    ):
        given = _as_list(funcs)
        if not given:
            raise RewardError("no reward function: give one at least")
        self.names = _numbered([_name(function) for function in given])
        self.weights = [1.0] * len(given) if weights is None else list(weights)
        tokenizers = [None] * len(given) if processing_classes is None else _as_list(processing_classes)
        self._one_each("weights", self.weights)
        self._one_each("processing_classes", tokenizers)
        if not all(map(_is_finite, self.weights)):
            raise RewardError(f"weights of the reward functions are finite numbers, not {self.weights}")
        self.functions: list[Callable[..., Any]] = [
            ModelReward(function, name, processing_class, tokenizer)
            if isinstance(function, nn.Module | str | Path)
            else function
            for name, function, tokenizer in zip(self.names, given, tokenizers, strict=True)
        ]
        self.models = [f.model for f in self.functions if isinstance(f, ModelReward)]
        """The reward models among the functions, in their order."""

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        prompt_ids: Sequence[list[int]],
        completion_ids: Sequence[list[int]],
        columns: Mapping[str, Sequence[Any]] = {},
    ) -> Scores:
        """Score N completions: text, the ids that were sampled (stop token included), columns of the data."""
        arguments: dict[str, Sequence[Any]] = {
            "prompts": list(prompts),
            "completions": list(completions),
            "prompt_ids": list(prompt_ids),
            "completion_ids": list(completion_ids),
        }
        _check_columns(columns, arguments)
        arguments |= {name: list(values) for name, values in columns.items()}
        lengths = [len(ids) for ids in completion_ids]
        rows = [
            _checked(name, _called(name, function, arguments), prompts, lengths)
            for name, function in zip(self.names, self.functions, strict=True)
        ]
        return _added(self.names, self.weights, rows, lengths)

    def _one_each(self, what: str, values: Sequence[Any]) -> None:
        if len(values) != len(self.names):
            raise RewardError(
                f"{len(values)} {what} for {len(self.names)} reward functions "
                f"({', '.join(self.names)}): give one for each"
            )


@dataclass(frozen=True)
class _Returned:
    """What a function returned, for each completion in a list: one number, or one for each token."""

    rows: list[list[float]]
    per_token: bool


def _added(
    names: Sequence[str], weights: Sequence[float], found: Sequence[_Returned], lengths: Sequence[int]
) -> Scores:
    scalars = [0.0] * len(lengths)
    tokens = [[0.0] * length for length in lengths]
    for weight, returned in zip(weights, found, strict=True):
        for i, row in enumerate(returned.rows):
            if returned.per_token:
                tokens[i] = [sofar + weight * value for sofar, value in zip(tokens[i], row, strict=True)]
            else:
                scalars[i] += weight * row[0]
    return Scores(
        totals=[scalar + sum(row) for scalar, row in zip(scalars, tokens, strict=True)],
        tokens=tokens if any(returned.per_token for returned in found) else None,
        scalars=scalars,
        by_function={n: [sum(row) for row in f.rows] for n, f in zip(names, found, strict=True)},
    )


def _called(name: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """What the function returns when it is given those of the arguments that it takes."""
    taken = _taken(name, function, arguments)
    if isinstance(function, ModelReward):
        return function(**taken)

    def call() -> Any:
        try:
            return function(**taken)
        except Exception as error:
            frames = extract_tb(error.__traceback__)[1:2]  # where in the function, not below it
            where = "".join(f" in line {frame.lineno} of {Path(frame.filename).name}" for frame in frames)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise RewardError(
                f"reward function {name}: raised {reason}{where}, when called with "
                f"{len(arguments['prompts'])} prompts; mend it or leave it out"
            ) from error

    return once(call)


def _taken(name: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some of those written in C do not tell
        return dict(arguments)
    required = {
        p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }
    if missing := sorted(required - arguments.keys()):
        raise RewardError(
            f"reward function {name}: takes `{missing[0]}`, which is no column of the data; "
            f"there are: {', '.join(arguments)}"
        )
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(arguments)
    return {p.name: arguments[p.name] for p in parameters if p.name in arguments}


def _check_columns(columns: Mapping[str, Sequence[Any]], arguments: Mapping[str, Sequence[Any]]) -> None:
    count = len(arguments["prompts"])
    for name, values in columns.items():
        if name in arguments:
            raise RewardError(f"column `{name}` has the name of what reward functions are given: rename it")
        if len(values) != count:
            raise RewardError(
                f"column `{name}` has {len(values)} values for {count} prompts: give one for each"
            )


def _checked(name: str, returned: Any, prompts: Sequence[Prompt], lengths: Sequence[int]) -> _Returned:
    """The numbers that a function returned, or the first thing that is wrong with them."""
    values = _plain(returned)
    if not isinstance(values, list):
        raise RewardError(
            f"reward function {name}: returned {shortened(repr(returned))}; return a list with a number, or "
            f"a list of numbers, for each of the {len(prompts)} completions"
        )
    if len(values) != len(prompts):
        raise RewardError(
            f"reward function {name}: returned {len(values)} rewards for {len(prompts)} completions "
            f"(first prompt {quoted(prompts[0] if prompts else '')}); return one for each"
        )
    values = [_plain(value) for value in values]
    per_token = bool(values) and isinstance(values[0], list)
    rows = []
    for prompt, value, length in zip(prompts, values, lengths, strict=True):
        row = [_plain(number) for number in value] if isinstance(value, list) else [value]
        if wrong := _fault(value, row, per_token, length):
            raise RewardError(f"reward function {name}, prompt {quoted(prompt)}: returned {wrong}")
        rows.append([float(number) for number in row])
    return _Returned(rows, per_token)


def _fault(value: Any, row: list[Any], per_token: bool, length: int) -> str | None:
    """What is wrong with the reward of one completion, and what to do."""
    for at, number in enumerate(row):
        if not _is_finite(number):
            where = f" for token {at}" if isinstance(value, list) else ""
            return f"{shortened(repr(number))}{where}; return a finite number"
    if isinstance(value, list) != per_token:
        one, other = ("a list", "numbers") if isinstance(value, list) else ("a number", "lists")
        return (
            f"{one}, {shortened(repr(value))}, and {other} before; return the same kind for all completions"
        )
    if per_token and len(row) != length:
        return (
            f"{len(row)} numbers, {shortened(repr(value))}, for a completion of {length} tokens; return one "
            "for each of its completion_ids, or a number alone"
        )
    return None


def _is_finite(number: Any) -> bool:
    return isinstance(number, Real) and -math.inf < float(number) < math.inf  # false for NaN


def _plain(value: Any) -> Any:
    """Lists and numbers of Python, also where they were arrays or tensors."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return list(value) if isinstance(value, tuple) else value


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _name(function: RewardFunction) -> str:
    while isinstance(function, partial):
        function = function.func
    if isinstance(function, nn.Module):
        function = getattr(getattr(function, "config", None), "_name_or_path", "") or type(function).__name__
    if isinstance(function, str | Path):
        return Path(function).name
    return str(getattr(function, "__name__", type(function).__name__))


def _numbered(names: Sequence[str]) -> list[str]:
    """The second and later ones of the same name get a number behind it."""
    made: list[str] = []
    for name in names:
        number, unique = 1, name
        while unique in made:
            number += 1
            unique = f"{name}_{number}"
        made.append(unique)
    return made
