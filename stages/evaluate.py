"""Evaluate: one reply of every policy to each test prompt, with everything measured on it.

    prefloop evaluate configs/quickstart.yaml evaluate.examples=100

Reads    policies        by name; `sft` is what the others are compared with, `base` the untuned model
         reward          a reward model: scores every reply, and chooses best-of-n among SFT's replies
         prompts         records; the test split of use `policy`
         rollouts        PPO's samples, to see the true score over training
         items           pairs of replies; those held out test the reward model against the rubric
Writes   records.jsonl   one Evaluation row for each policy and prompt; the report needs nothing else
         training.jsonl  the rollouts with their true score

Replies are drawn at temperature 1, the distribution that KL and the training objectives speak of. One model
is in memory at a time. Best-of-n keeps the best of n SFT replies by the reward model, and by the rubric where
there is one: the ceiling of what any reward model could choose.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from annotate.records import Evaluation, Item, Record, read, write
from stages import measures
from stages.config import Items, Model, Reads, Records, StageConfig, UserError
from stages.run import Run

VERSION = 2

DEMONSTRATIONS = 4000
"""How many are scored: enough to know their mean to about 0.1 of 10 points."""

Count = Annotated[int, Field(ge=1)]


class Config(StageConfig):
    policies: dict[str, Model]
    """Table rows in this order. `sft` must be one of them."""
    reward: Annotated[str, Reads("model")] | None = None
    prompts: Records
    rollouts: Annotated[str, Reads("rollouts.jsonl")] | None = None
    items: Items | None = None
    gold: Literal["helpdesk", "none"] = "none"
    """The world whose rubric scores replies; none: no truth is known, and the reward model stays a proxy."""
    examples: int = Field(default=400, ge=2)
    """The first so many prompts in the order of their ids, which are hashes: the same for every seed."""
    best_of: Count | list[Count] = 8
    """How many of SFT's replies best-of-n chooses from. Several: of the same replies the first so many."""
    max_new_tokens: int = Field(default=64, ge=1)

    @field_validator("policies")
    @classmethod
    def _with_reference(cls, policies: dict[str, str]) -> dict[str, str]:
        if "sft" not in policies:
            raise ValueError(
                "one policy must be named sft: win rates, KL and headroom are measured against it"
            )
        return policies

    @property
    def sizes(self) -> list[int]:
        """Of best-of-n."""
        return [self.best_of] if isinstance(self.best_of, int) else self.best_of


def main(config: Config, run: Run) -> None:
    world = World() if config.gold == "helpdesk" else None
    check_families(config)
    given = read(config.prompts, Record)
    records, prompts = choose_prompts(config, given, run)
    check_reward_model(config, run, world)
    score_demonstrations(given, run, world)

    replies = sample_all(config, run, records, prompts)
    flat = [reply for of_policy in replies.values() for group in of_policy for reply in group]
    if config.reward is not None:
        measures.measure_reward(config.reward, flat)
    for reply in flat:
        reply.gold = world.score(reply.record.facts, reply.text) if world else None

    table = choose_best(config, replies)
    away = [reply for policy in config.policies if policy != "sft" for reply in table[policy]]
    measures.measure_kl(config.policies["sft"], away)
    if "base" in config.policies:
        measures.measure_base_loss(config.policies["base"], [r for kept in table.values() for r in kept])
    rows = [row for policy in table for row in evaluations(policy, table, world)]
    write(run.output("records.jsonl"), rows)
    write_training(config, given, run, world)
    summarise(config, run, rows, world)


class World:
    """The helpdesk's rubric: the truth that no training stage sees."""

    def __init__(self) -> None:
        from stages.helpdesk import rubric

        self.rubric = rubric

    def score(self, facts: dict[str, Any], reply: str) -> float:
        return float(self.rubric.score(facts, reply).total)

    def lexicon(self, reply: str) -> float:
        return float(self.rubric.lexicon_share(reply))


def check_families(config: Config) -> None:
    """Before any sampling: every model must read the same token ids as SFT."""
    for policy, path in config.policies.items():
        if policy != "sft":
            measures.require_same_vocabulary(f"policies.{policy}", path, config.policies["sft"])
    if config.reward is not None:
        measures.require_same_vocabulary("reward", config.reward, config.policies["sft"])


def choose_prompts(config: Config, given: Sequence[Record], run: Run) -> tuple[list[Record], list[list[int]]]:
    """The test records and their prompts as token ids; those that leave no room for a reply are counted."""
    from transformers import AutoConfig

    from reward.model import load_tokenizer
    from reward.tokens import prompt_ids

    rows = [r for r in given if r.split == "test" and r.use == "policy"]
    if len(rows) < 2:
        raise UserError(
            f"{config.prompts}: {len(rows)} records of split test and use policy; evaluate needs two"
        )
    tokenizer, _ = load_tokenizer(config.policies["sft"])
    limit = getattr(AutoConfig.from_pretrained(config.policies["sft"]), "max_position_embeddings", None)
    chosen: list[Record] = []
    prompts: list[list[int]] = []
    long = 0
    for row in sorted(rows, key=lambda r: r.id):
        if len(chosen) == config.examples:
            break
        ids = prompt_ids(tokenizer, row.prompt)
        if limit is not None and len(ids) + config.max_new_tokens > limit:
            long += 1
            continue
        chosen.append(row)
        prompts.append(ids)
    if len(chosen) < 2:
        raise UserError(
            f"{long} of {len(rows)} test prompts leave no room for max_new_tokens={config.max_new_tokens} in "
            f"the {limit} positions of {config.policies['sft']}: set evaluate.max_new_tokens lower"
        )
    if long or len(chosen) < config.examples:
        run.say(f"{len(chosen)} test prompts ({config.examples} asked; {long} too long for the model)")
    run.record(prompts=len(chosen), prompts_too_long=long)
    return chosen, prompts


Replies = dict[str, list[list[measures.Reply]]]
"""By policy and prompt: one reply, of SFT as many as best-of-n needs."""


def sample_all(config: Config, run: Run, records: Sequence[Record], prompts: Sequence[list[int]]) -> Replies:
    replies: Replies = {}
    counts = {policy: max([1, *config.sizes]) if policy == "sft" else 1 for policy in config.policies}
    total = len(records) * sum(counts.values())
    with run.progress("sampling", total=total, unit="samples") as bar:
        for policy, path in config.policies.items():
            keys = [
                [f"{run.seed}/evaluate/{policy}/{r.id}/{k}" for k in range(counts[policy])] for r in records
            ]
            replies[policy] = measures.sample(path, records, prompts, keys, config.max_new_tokens, bar)
    return replies


def choose_best(config: Config, replies: Replies) -> dict[str, list[measures.Reply]]:
    """The table's rows in order: each policy's first reply to each prompt; after SFT's, the best of its n."""
    judges: dict[str, Callable[[measures.Reply], float]] = {}
    if config.reward is not None:
        judges["rm"] = lambda r: r.reward or 0.0
    if config.gold != "none":
        judges["rubric"] = lambda r: r.gold or 0.0
    table: dict[str, list[measures.Reply]] = {}
    for policy, groups in replies.items():
        table[policy] = [group[0] for group in groups]
        if policy == "sft":
            for judge, score in judges.items():
                for n in config.sizes:
                    if n > 1:
                        table[f"best-of-{n} ({judge})"] = [max(group[:n], key=score) for group in groups]
    return table


def evaluations(policy: str, table: dict[str, list[measures.Reply]], world: World | None) -> list[Evaluation]:
    return [
        Evaluation(
            **reply.record.model_dump(exclude={"completion"}),
            policy=policy,
            completion=reply.text,
            length=len(reply.tokens),
            stopped=reply.stopped,
            gold=reply.gold,
            reward=reply.reward,
            kl=None if policy.startswith("best-of-") else 0.0 if policy == "sft" else reply.kl,
            win=measures.win(reply.gold, sft.gold),
            repetition=measures.repetition(reply.text),
            base_loss=reply.base_loss,
            lexicon=world.lexicon(reply.text) if world else None,
        )
        for reply, sft in zip(table[policy], table["sft"], strict=True)
    ]


def write_training(config: Config, given: Sequence[Record], run: Run, world: World | None) -> None:
    from stages.ppo_rollout import Rollout

    rollouts = read(config.rollouts, Rollout) if config.rollouts else []
    if world:
        records = {record.id: record for record in given}
        rollouts = [
            r.model_copy(update={"gold": world.score(records[r.id].facts, r.completion)}) for r in rollouts
        ]
    write(run.output("training.jsonl"), rollouts)


def check_reward_model(config: Config, run: Run, world: World | None) -> None:
    """How often the reward model prefers the reply that the rubric prefers, on held-out pairs that differ."""
    if config.reward is None or config.items is None or world is None:
        return
    from annotate.statistics import proportion

    items = [
        item for item in read(config.items, Item) if item.split != "train" and len(item.completions) == 2
    ]
    golds = [[world.score(item.facts, text) for text in item.completions] for item in items]
    kept = [(item, gold) for item, gold in zip(items, golds, strict=True) if gold[0] != gold[1]]
    if not kept:
        run.say("no held-out pair of items differs in its rubric score: the reward model was not tested")
        return
    scores = measures.score_items(config.reward, [item for item, _ in kept])
    agrees = [float((g[0] > g[1]) == (s[0] > s[1])) for (_, g), s in zip(kept, scores, strict=True)]
    found = proportion(agrees, [item.id for item, _ in kept])
    run.record(
        reward_agreement={"value": found.value, "low": found.low, "high": found.high, "pairs": len(kept)}
    )


def score_demonstrations(given: Sequence[Record], run: Run, world: World | None) -> None:
    """What SFT imitates, by the rubric: the score that its own replies should come close to."""
    if world is None:
        return
    from annotate.statistics import mean

    rows = (r for r in given if r.split == "train" and r.use == "sft" and r.completion)
    chosen = sorted(rows, key=lambda r: r.id)[:DEMONSTRATIONS]
    if len(chosen) < 2:
        return
    found = mean([world.score(r.facts, r.completion or "") for r in chosen], [r.id for r in chosen])
    run.record(demonstrations={"value": found.value, "low": found.low, "high": found.high})


def summarise(config: Config, run: Run, rows: Sequence[Evaluation], world: World | None) -> None:
    """What the report needs beside the rows: what each was made from, and the rubric's scale."""
    made_from = {policy: [f"policies.{policy}"] for policy in config.policies}
    for policy in dict.fromkeys(row.policy for row in rows):
        of_policy = [row for row in rows if row.policy == policy]
        if policy not in made_from:
            made_from[policy] = ["policies.sft", *(["reward"] if policy.endswith("(rm)") else [])]
        golds = [row.gold for row in of_policy if row.gold is not None]
        rewards = [row.reward for row in of_policy if row.reward is not None]
        means = {"gold": golds, "reward": rewards}
        run.record(**{f"{name}/{policy}": sum(found) / len(found) for name, found in means.items() if found})
    run.record(made_from=made_from, best_of=config.best_of, world=config.gold)
    if world:
        run.record(gold_minimum=float(world.rubric.MINIMUM), gold_maximum=float(world.rubric.MAXIMUM))


if __name__ == "__main__":
    from stages.cli import launch

    launch("evaluate")
