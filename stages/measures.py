"""What evaluation measures on a reply: KL to SFT, reward, loss under the base model, repetition.

Each function loads the one model it needs and lets it go, so that one model at a time is in memory.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from annotate.records import Item, Record
from stages.config import UserError


@dataclass
class Reply:
    """One sampled reply on its way through the models."""

    record: Record
    prompt: list[int]
    """Token ids."""
    tokens: list[int]
    text: str
    stopped: bool
    logprob: float
    """Sum over its tokens under the policy that wrote it, nats."""
    gold: float | None = None
    reward: float | None = None
    kl: float | None = None
    base_loss: float | None = None


def require_same_vocabulary(field: str, path: str, sft: str) -> None:
    """Raises UserError where token ids of `path` do not mean what they mean to SFT."""
    from reward.model import load_tokenizer, same_vocabulary

    if not same_vocabulary(load_tokenizer(path)[0], load_tokenizer(sft)[0]):
        raise UserError(
            f"evaluate.{field}: {path} has another vocabulary or chat template than sft ({sft}), so its KL "
            "and scores would mean nothing: give a model of the same family"
        )


def sample(
    path: str,
    records: Sequence[Record],
    prompts: Sequence[list[int]],
    keys: Sequence[list[str]],
    max_new_tokens: int,
    bar: Any,
) -> list[list[Reply]]:
    """For each prompt (token ids) as many replies of the policy as it has keys, at temperature 1."""
    from reward.model import load_policy
    from reward.sampler import Sampler

    model, tokenizer = load_policy(path)
    sampler = Sampler(model, tokenizer, max_new_tokens)
    repeated = [prompt for prompt, of_prompt in zip(prompts, keys, strict=True) for _ in of_prompt]
    drawn = iter(sampler.sample(repeated, [key for of_prompt in keys for key in of_prompt], bar))
    replies = []
    for record, prompt, of_prompt in zip(records, prompts, keys, strict=True):
        found = [next(drawn) for _ in of_prompt]
        replies.append(
            [Reply(record, prompt, s.tokens, sampler.text(s), s.stopped, sum(s.logprobs)) for s in found]
        )
    return replies


def measure_kl(sft: str, replies: Sequence[Reply]) -> None:
    """log pi(y|x) - log pi_sft(y|x) of every reply, nats."""
    from reward.batch import Example
    from reward.model import load_policy
    from reward.tokens import logprobs

    model, _ = load_policy(sft)
    found = logprobs(model, [Example(r.prompt, (r.tokens,)) for r in replies])
    for reply, (values,) in zip(replies, found, strict=True):
        reply.kl = reply.logprob - sum(values)


def measure_base_loss(base: str, replies: Sequence[Reply]) -> None:
    """Mean loss per token of the untuned model on the bare reply, nats: how far from plain text it is.

    The reply stands alone, as a document would, without chat frame, prompt and stop token. Empty replies have
    no loss.
    """
    from reward.batch import Example
    from reward.model import load_policy
    from reward.tokens import logprobs

    model, tokenizer = load_policy(base)
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    limit = getattr(model.config, "max_position_embeddings", None)
    texts = {r.text: tokenizer(r.text, add_special_tokens=False)["input_ids"] for r in replies if r.text}
    known = [text for text, ids in texts.items() if ids]
    found = logprobs(
        model, [Example([start], (texts[text][: limit - 1 if limit else None],)) for text in known]
    )
    losses = {text: -sum(values) / len(values) for text, (values,) in zip(known, found, strict=True)}
    for reply in replies:
        reply.base_loss = losses.get(reply.text)


def measure_reward(path: str, replies: Sequence[Reply]) -> None:
    """The reward model's score of every reply, stop token included."""
    from reward.batch import Example
    from reward.model import load_reward
    from reward.tokens import rewards

    model, _ = load_reward(path)
    found = rewards(model, [Example(r.prompt, (r.tokens,)) for r in replies])
    for reply, (value,) in zip(replies, found, strict=True):
        reply.reward = value


def score_items(path: str, items: Sequence[Item]) -> list[list[float]]:
    """The reward model's scores of every item's completions."""
    from reward.model import load_reward
    from reward.together import each_once
    from reward.tokens import encode, rewards

    model, tokenizer = load_reward(path)
    examples = encode(tokenizer, [(item.prompt, item.completions) for item in items])
    return each_once(examples, lambda distinct: rewards(model, distinct))


def win(gold: float | None, against: float | None) -> float | None:
    """1 for the better reply, 0.5 for a tie, 0 for the worse."""
    if gold is None or against is None:
        return None
    return 0.5 + 0.5 * ((gold > against) - (gold < against))


def repetition(text: str, size: int = 4) -> float:
    """Share of the reply's 4-grams of words that occurred earlier in it; 0 below four words."""
    words = re.findall(r"\w+(?:'\w+)*", text.lower())
    grams = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
