"""Sample: several replies of the policy to each prompt, for annotators to compare.

    prefloop sample configs/quickstart.yaml sample.train=500

Reads    policy             the model that answers
         prompts            records; those of use `preference` are answered
         reward             a reward model, of a round before: the items it is least sure about come first
Writes   completions.jsonl  every reply with its token ids and log-probabilities
         items.jsonl        a prompt and its distinct replies, or so many of them, to judge
"""

from collections.abc import Sequence
from itertools import combinations, groupby
from typing import Annotated, Self

from pydantic import Field, model_validator

from annotate.records import Completion, Item, Record, read, write
from stages.config import InKeyIfSet, Model, Reads, Records, StageConfig, UserError
from stages.run import Run

VERSION = 1


class Config(StageConfig):
    policy: Model
    prompts: Records
    train: int = 1000
    """How many prompts of the training split."""
    held_out: int = 200
    """How many of validation and test together; the reward model is measured on them."""
    completions: int = 2
    """How many replies to each prompt."""
    per_item: Annotated[int | None, Field(ge=2), InKeyIfSet()] = None
    """How many of them an item shows: every such choice of a prompt's distinct replies is one. None: all."""
    max_new_tokens: int = 96
    temperature: float = 1.0
    reward: Annotated[str | None, Reads("model"), InKeyIfSet()] = None
    """A reward model. People then judge first the items whose replies it scores most alike; None: by draw."""

    @model_validator(mode="after")
    def _enough_for_an_item(self) -> Self:
        if self.per_item is not None and self.per_item > self.completions:
            raise ValueError(
                f"per_item {self.per_item}: there are {self.completions} completions to choose from"
            )
        return self


def main(config: Config, run: Run) -> None:
    from reward.model import load_policy
    from reward.sampler import Sampler
    from reward.tokens import prompts_ids
    from stages.measures import score_items

    records = choose(read(config.prompts, Record), config)
    model, tokenizer = load_policy(config.policy)
    sampler = Sampler(model, tokenizer, config.max_new_tokens, config.temperature)
    jobs = [(record, k) for record in records for k in range(config.completions)]
    prompts = prompts_ids(tokenizer, [record.prompt for record, _ in jobs])
    with run.progress("sampling", total=len(jobs), unit="replies") as bar:
        samples = sampler.sample(prompts, [f"{run.seed}/sample/{r.id}/{k}" for r, k in jobs], bar)

    policy = run.inputs["policy"].digest
    completions = [
        Completion(
            **record.model_dump(exclude={"completion"}),
            policy=policy,
            completion=sampler.text(sample),
            tokens=sample.tokens,
            logprobs=sample.logprobs,
            stopped=sample.stopped,
        )
        for (record, _), sample in zip(jobs, samples, strict=True)
    ]
    items = to_items(completions, config.per_item)
    if config.reward is not None:
        del model, sampler  # one model at a time is in memory
        items = prioritised(items, score_items(config.reward, items))
    write(run.output("completions.jsonl"), completions)
    write(run.output("items.jsonl"), items)
    run.record(
        prompts=len(records),
        items=len(items),
        without_item=len(records) - len({item.id for item in items}),
        self_stopping=sum(c.stopped for c in completions) / len(completions),
    )


def choose(records: Sequence[Record], config: Config) -> list[Record]:
    """The first prompts by id (a hash, so a random but fixed order) of each side of the split."""
    of_use = sorted((r for r in records if r.use == "preference"), key=lambda r: r.id)
    train = [r for r in of_use if r.split == "train"][: config.train]
    held_out = [r for r in of_use if r.split != "train"][: config.held_out]
    if not train:
        raise UserError(f"{config.prompts}: no prompt of use `preference` in the training split to answer")
    return train + held_out


def to_items(completions: Sequence[Completion], per_item: int | None = None) -> list[Item]:
    """Every choice of `per_item` of a prompt's distinct replies, in the order sampled, or all in one item.

    None where there are fewer, nor where several are one.
    """
    items = []
    for _, group in groupby(completions, key=lambda c: c.id):
        replies = list(group)
        distinct = list(dict.fromkeys(reply.completion for reply in replies))
        if len(distinct) == 1 < len(replies):
            continue
        shared = replies[0].model_dump(include={"id", "split", "use", "prompt", "facts"})
        for chosen in combinations(distinct, per_item or len(distinct)):
            items.append(Item(**shared, completions=list(chosen), policies=[replies[0].policy] * len(chosen)))
    return items


def prioritised(items: Sequence[Item], scores: Sequence[Sequence[float]]) -> list[Item]:
    """The items with minus the spread of their completions' scores as priority: the least sure comes first.

    Of two completions the spread is the difference of scores, whose logistic is the model's own probability
    that one is preferred to the other: nearest to one half where the difference is smallest.
    """
    return [
        item.model_copy(update={"priority": min(of_item) - max(of_item)})
        for item, of_item in zip(items, scores, strict=True)
    ]


if __name__ == "__main__":
    from stages.cli import launch

    launch("sample")
