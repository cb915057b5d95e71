"""Reward model: learn from judgements which reply to a prompt is better.

    prefloop rm configs/quickstart.yaml rm.trainer.learning_rate=5e-4

Reads    policy       whose trunk and tokenizer it starts from, usually the SFT model
         judgements   comparisons of two replies; ties and strength count (see reward/losses.py)
Writes   model/       a sequence-classification model with one label, for `from_pretrained`

Comparisons of the training split train it, those of validation and test measure it. Those of one prompt that
share replies are one example of a batch (reward/together.py): of four replies in six pairs each is read once,
and `per_device_train_batch_size` counts such prompts. The model reads token ids, the stop token included; the
reward is the mean of the head over the reply (`reward.tokens.scores`). Its accuracy stands beside two trivial
judges: "longer wins" and a bag of words.
"""

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from annotate.records import Judgement, read
from stages.config import Judgements, KeysOf, Model, StageConfig, UserError
from stages.run import Run

if TYPE_CHECKING:
    from reward.batch import Example
    from reward.losses import Comparison

VERSION = 3

FAULTS = ("too_long", "prompt_too_long", "identical", "no_verdict", "not_a_pair")


class Config(StageConfig):
    policy: Model
    judgements: Judgements
    max_length: int | None = Field(None, ge=1)
    """Tokens of prompt and reply; longer comparisons are left out and counted. None: what the model takes."""
    trainer: Annotated[dict[str, Any], KeysOf("stages.arguments.EngineArguments")] = {}


def main(config: Config, run: Run) -> None:
    from reward.losses import PreferenceLikelihood
    from reward.model import load_reward, longest_row, new_reward_model, save
    from reward.parallel import wait
    from reward.together import together
    from stages.arguments import arguments
    from stages.engine import Engine, Epochs, Reporting, train

    judgements = read(config.judgements, Judgement)
    train_rows = [j for j in judgements if j.split == "train"]
    held_out = [j for j in judgements if j.split != "train"]
    model, tokenizer = new_reward_model(config.policy)
    limit = longest_row(model, config.max_length)
    examples = comparisons(tokenizer, train_rows, limit, run)

    args = arguments(run, config.trainer, learning_rate=3e-4, lr_scheduler_type="cosine")
    objective = PreferenceLikelihood(model, examples)
    steps = Epochs(together(examples), args)
    reporting = Reporting(run, "reward model", ("loss", "accuracy"))
    train(Engine(model, args, objective, steps, [reporting]), run)

    facts = {"thresholds": objective.detach(model), "labelled_by": who(train_rows)}
    save(model, tokenizer, run.output("model"))
    run.record(**facts)
    wait()  # the first process writes it for all
    reloaded, _ = load_reward(run.path / "model")
    reloaded.path = model.path
    check_reload(model, reloaded, examples[:16])
    measure(reloaded, tokenizer, in_pairs(train_rows), in_pairs(held_out), limit, run)


def in_pairs(judgements: Sequence[Judgement]) -> list[Judgement]:
    """Of two completions each: rankings of more become all their pairs."""
    return [pair for judgement in judgements for pair in judgement.pairs()]


def comparisons(tokenizer: Any, judgements: Sequence[Judgement], limit: int, run: Run) -> "list[Comparison]":
    """One example for each pair judged, with the counts of its verdicts; what cannot be used is counted."""
    examples, faults = usable(tokenizer, judgements, limit)
    report(examples, faults, run)
    if not examples:
        raise UserError(nothing_to_train_on(judgements, run))
    return examples


def nothing_to_train_on(judgements: Sequence[Judgement], run: Run) -> str:
    """Why, from what has been recorded of them."""
    if run.manifest.metrics["pairs"]:
        return "no pair to train on: every judgement is a tie"
    dropped = {name: count for name, count in run.manifest.facts["dropped"].items() if count}
    return f"no comparison to train on: {len(judgements)} judgements, left out {dropped}"


def usable(
    tokenizer: Any, judgements: Sequence[Judgement], limit: int
) -> "tuple[list[Comparison], dict[str, list[str]]]":
    """(the pairs that can be learned from, the tasks of the others by what is wrong with them)."""
    from reward.losses import Comparison, count_preferences
    from reward.tokens import encode

    examples = []
    faults: dict[str, list[str]] = {name: [] for name in FAULTS}
    rows = sorted(((j.task, j) for j in in_pairs(judgements)), key=itemgetter(0))
    groups = [(task, [j for _, j in group]) for task, group in groupby(rows, key=itemgetter(0))]
    encoded = encode(tokenizer, [(of_pair[0].prompt, of_pair[0].completions) for _, of_pair in groups])
    for (task, of_pair), ids in zip(groups, encoded, strict=True):
        example = Comparison(ids.prompt, ids.completions, count_preferences(of_pair), task)
        wrong = fault(example, limit) if sum(example.counts) else "no_verdict"
        if wrong:
            faults[wrong].append(task)
        else:
            examples.append(example)
    faults["not_a_pair"] = [j.task for j in judgements if not j.pairs()]
    return examples, faults


def fault(example: "Example", limit: int) -> str | None:
    """Why nothing can be learned from an example, in a word of FAULTS."""
    if len(example.prompt) >= limit:
        return "prompt_too_long"
    if example.length > limit:
        return "too_long"
    if len(set(map(tuple, example.completions))) < len(example.completions):
        return "identical"
    return None


def report(examples: "Sequence[Any]", faults: dict[str, list[str]], run: Run, of: str = "") -> None:
    """Record how many can be used and which not; say so where the data looks wrong. `of`: prefix of names."""
    empty = [e.task for e in examples if min(map(len, e.completions)) == 1]
    facts = {
        "pairs": len(examples),
        "empty_replies": len(empty),  # the stop token alone: judged like any other, so they stay
        "dropped": {name: len(tasks) for name, tasks in faults.items()},
        "dropped_tasks": {name: tasks[:20] for name, tasks in faults.items() if tasks},
    }
    run.record(**{of + name: fact for name, fact in facts.items()})
    pairs = of.replace("_", "-", 1).replace("_", " ") + "pairs"
    for name in ("prompt_too_long", "identical"):
        if tasks := faults[name]:
            run.say(f"left out {len(tasks)} {pairs}: {name} (task {tasks[0]}, ...)")
    if empty:
        run.say(f"{len(empty)} {pairs} with an empty reply (task {empty[0]}, ...) are used")


def measure(
    model: Any, tokenizer: Any, train: list[Judgement], held_out: list[Judgement], limit: int, run: Run
) -> None:
    from reward import metrics

    differences = score_differences(model, tokenizer, held_out, limit)
    judged = [j for j, d in zip(held_out, differences, strict=True) if d is not None and j.preference]
    if not judged:
        run.gate("reward model above chance", False, "no held-out judgement to measure it on")
        return
    of_model = metrics.accuracy(
        judged, [d for j, d in zip(held_out, differences, strict=True) if d is not None and j.preference]
    )
    of_length, of_words = metrics.longer_wins(judged), metrics.bag_of_words(train, judged)
    for name, estimate in (("accuracy", of_model), ("longer_wins", of_length), ("bag_of_words", of_words)):
        run.record(**{name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high})
    run.record(held_out=of_model.n)
    run.gate(
        "reward model above chance",
        of_model.low > 0.5 and of_model.value > of_length.value,
        f"held-out accuracy {of_model.value:.3f} [{of_model.low:.3f}, {of_model.high:.3f}] on {of_model.n} "
        f"judgements; longer wins {of_length.value:.3f}, bag of words {of_words.value:.3f}",
    )


def score_differences(
    model: Any, tokenizer: Any, judgements: Sequence[Judgement], limit: int
) -> list[float | None]:
    """Score of the first completion minus that of the second; None where the model cannot hold the pair."""
    from reward.paths import chosen
    from reward.together import each_once
    from reward.tokens import encode, rewards

    examples = encode(tokenizer, [(j.prompt, j.completions[:2]) for j in judgements])
    fits = [i for i, example in enumerate(examples) if example.length <= limit]
    differences: list[float | None] = [None] * len(examples)
    found = each_once(
        [examples[i] for i in fits], lambda distinct: rewards(chosen(model, distinct), distinct)
    )
    for i, (first, second) in zip(fits, found, strict=True):
        differences[i] = first - second
    return differences


def check_reload(model: Any, reloaded: Any, examples: Sequence[Any]) -> None:
    """A head lost on saving is the classic fault of reward models: what was saved must score the same.

    But for rounding: products add in an order that depends on where in memory the weights lie.
    """
    import torch

    from reward.tokens import rewards

    trained, saved = (
        torch.tensor([score for of_one in rewards(scorer, examples) for score in of_one])
        for scorer in (model, reloaded)
    )
    if not trained.isfinite().all():
        raise UserError(
            "the reward model gives scores that are not finite numbers: the policy that it started from has "
            "such weights, or trainer.learning_rate is too high"
        )
    if not torch.allclose(trained, saved, rtol=1e-4, atol=1e-5):
        raise UserError("the saved reward model does not score as the trained one did: do not use it")


def who(judgements: Sequence[Judgement]) -> dict[str, int]:
    """Judgements by kind of annotator: person, model, simulated."""
    kinds = [j.kind for j in judgements]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


if __name__ == "__main__":
    from stages.cli import launch

    launch("rm")
