"""A reward model as a reward function: reads the ids that were sampled, or the text in its own tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from annotate.records import DataError, Message
from reward.batch import Example
from reward.model import CheckpointError, load_reward, load_tokenizer, same_vocabulary
from reward.passes import encodes
from reward.paths import chosen
from reward.tokens import completion_ids as ids_of_completion
from reward.tokens import rendered, rewards

Prompt = str | Sequence[Mapping[str, str]]
"""Plain text, or messages with `role` and `content`."""


class RewardError(DataError):
    """A reward that cannot be used. One line: which function, on what, why, what to do."""


class ModelReward:
    """A sequence-classification model with one label, called like any reward function.

    Where its tokenizer has the policy's vocabulary and chat template, it reads the ids that were sampled.
    Else prompt and completion are rendered and tokenised again as it knows them, a conversation by its own
    chat template. Either way the last token is the stop token, unless the completion was cut off before one.
    A model that is given as such stays on its device.
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        name: str,
        policy_tokenizer: PreTrainedTokenizerBase,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        self.name, self.stop = name, policy_tokenizer.eos_token_id
        self.model, self.tokenizer = _with_tokenizer(model, name, tokenizer)
        self.limit = getattr(self.model.config, "max_position_embeddings", None)
        self.reads_ids = same_vocabulary(self.tokenizer, policy_tokenizer)
        if not self.reads_ids and self.tokenizer.eos_token_id is None:
            raise RewardError(f"reward model {name}: its tokenizer has no stop token; set its eos_token")

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        prompt_ids: Sequence[list[int]],
        completion_ids: Sequence[list[int]],
    ) -> list[float]:
        """One score for each completion."""
        rows = zip(prompts, completions, prompt_ids, completion_ids, strict=True)
        examples = [
            Example(prompt_ids, (completion_ids,))
            if self.reads_ids
            else self._tokenised(prompt, completion, completion_ids[-1:] == [self.stop])
            for prompt, completion, prompt_ids, completion_ids in rows
        ]
        for prompt, example in zip(prompts, examples, strict=True):
            self._check_length(prompt, example)
        return [score for (score,) in rewards(chosen(self.model, examples), examples)]

    def _tokenised(self, prompt: Prompt, completion: str, stopped: bool) -> Example:
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt)["input_ids"]
        elif self.tokenizer.chat_template is None:
            raise RewardError(
                f"reward model {self.name}: the prompts are messages and its tokenizer has no chat template; "
                "set one"
            )
        else:
            ids = self._rendered(prompt)
        reply = ids_of_completion(self.tokenizer, completion)
        return Example(ids, (reply if stopped else reply[:-1],))

    def _rendered(self, prompt: Sequence[Mapping[str, str]]) -> list[int]:
        try:
            return rendered(self.tokenizer, [[Message.model_validate(dict(m)) for m in prompt]])[0]
        except Exception as error:  # a template is a program of somebody else's and may raise anything
            reason = " ".join(str(error).split())
            raise RewardError(
                f"reward model {self.name}, prompt {quoted(prompt)}: its chat template refuses it "
                f"({shortened(reason)}); change the prompt, or the template of its tokenizer"
            ) from error

    def _check_length(self, prompt: Prompt, example: Example) -> None:
        if not example.prompt:
            raise RewardError(
                f"reward model {self.name}: an empty prompt has no token to start from; drop it"
            )
        if self.limit is not None and example.length > self.limit:
            raise RewardError(
                f"reward model {self.name}, prompt {quoted(prompt)}: {example.length} tokens, the completion "
                f"included, do not fit the {self.limit} positions of the model; shorten or drop it"
            )


def _with_tokenizer(
    given: nn.Module | str | Path, name: str, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model and the tokenizer given for it or, where none was, the one that lies beside it."""
    if isinstance(given, nn.Module):
        _check_head(given, name)
        return given, tokenizer or _beside(getattr(given.config, "_name_or_path", ""), name)
    tokenizer = tokenizer or _beside(given, name)
    try:
        model, _ = load_reward(given, tokenizer)
    except CheckpointError as error:
        raise RewardError(f"reward model {name}: {error}") from error
    _check_head(model, name)
    return model, tokenizer


def _beside(path: str | Path, name: str) -> PreTrainedTokenizerBase:
    try:
        if path:
            return load_tokenizer(path)[0]
        reason = "it was not read from a folder"
    except CheckpointError as error:
        reason = str(error)
    raise RewardError(
        f"reward model {name}: no tokenizer lies beside it: {reason}; give the folder of a reward model and "
        "its tokenizer, or that tokenizer in processing_classes"
    )


def _check_head(model: Any, name: str) -> None:
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    if labels != 1 or not (hasattr(model, "score") or encodes(model)):
        raise RewardError(
            f"reward model {name}: is a {type(model).__name__} with {labels} labels; give a decoder or an "
            "encoder-decoder for sequence classification with num_labels=1, or call this model in a function "
            "of your own"
        )


def quoted(prompt: Prompt) -> str:
    """The prompt, or its last message, in quotes."""
    text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content")) if prompt else ""
    return f'"{shortened(text)}"'


def shortened(text: str) -> str:
    """One line of eighty characters at most."""
    line = " ".join(text.split())
    return line if len(line) <= 80 else line[:79] + "…"
