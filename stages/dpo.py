"""DPO: optimise the policy on judgements directly, without a reward model (Rafailov et al. 2023).

    prefloop dpo configs/quickstart.yaml dpo.beta=0.05

Reads    policy       where training starts; the same weights, frozen, are the reference
         judgements   comparisons of two replies; the side preferred on average is "chosen", ties are left out
Writes   model/       the optimised policy

The reference's log-probabilities are computed once, before the first step. The first batch must then have a
loss of ln 2: anything else means that policy and reference are not the same model.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from annotate.records import Judgement, read
from stages.config import Judgements, KeysOf, Model, StageConfig, UserError
from stages.rm import comparisons, who
from stages.run import Run

if TYPE_CHECKING:
    from stages.objectives import Pair

VERSION = 1


class Config(StageConfig):
    policy: Model
    judgements: Judgements
    beta: float = 0.1
    """Strength of the pull towards the reference."""
    max_length: int | None = None
    """Tokens of prompt and reply; longer pairs are left out and counted. None: what the model takes."""
    trainer: Annotated[dict[str, Any], KeysOf("transformers.TrainingArguments")] = {}


def main(config: Config, run: Run) -> None:
    from reward.model import load_policy, save
    from stages.engine import Engine, Epochs, Reporting, arguments, train
    from stages.objectives import DPO

    rows = [j for j in read(config.judgements, Judgement) if j.split == "train"]
    model, tokenizer = load_policy(config.policy)
    reference, _ = load_policy(config.policy)
    limit = config.max_length or model.config.max_position_embeddings
    pairs = preference_pairs(reference, tokenizer, rows, limit, run)
    del reference

    args = arguments(run, config.trainer, learning_rate=1e-4, lr_scheduler_type="linear")
    steps = Epochs(pairs, args)
    check_first_batch(model, DPO(config.beta), next(iter(steps.start(0))), run)
    shown = ("loss", "accuracy", "margin")
    train(Engine(model, args, DPO(config.beta), steps, [Reporting(run, "DPO", shown)]), run)
    save(model, tokenizer, run.output("model"))
    run.record(labelled_by=who(rows))


def preference_pairs(
    reference: Any, tokenizer: Any, rows: Sequence[Judgement], limit: int, run: Run
) -> "list[Pair]":
    """Pairs with a preferred side, with the reference's log-probability of both."""
    from reward.batch import Example
    from reward.tokens import logprobs
    from stages.objectives import Pair

    ordered = []
    for comparison in comparisons(tokenizer, rows, limit, run):
        lean = sum(count * strength for count, strength in zip(comparison.counts, range(-3, 4), strict=True))
        first, second = comparison.completions
        if lean:
            ordered.append(Example(comparison.prompt, (first, second) if lean > 0 else (second, first)))
    if not ordered:
        raise UserError("no pair to train on: every judgement is a tie")
    run.record(pairs_trained=len(ordered))
    with run.progress("reference log-probabilities", total=1, unit="passes") as bar:
        of_reference = logprobs(reference, ordered)
        bar.advance(1)
    return [
        Pair(example.prompt, example.completions, (sum(chosen), sum(rejected)))
        for example, (chosen, rejected) in zip(ordered, of_reference, strict=True)
    ]


def check_first_batch(model: Any, objective: Any, batch: "Sequence[Pair]", run: Run) -> None:
    import torch

    with torch.no_grad():
        loss = float(objective.loss(model, batch)[0]) / objective.weight(batch)
    run.record(first_batch_loss=loss)
    if abs(loss - math.log(2)) > 1e-3:
        raise UserError(f"the first batch has loss {loss:.4f}, not ln 2: policy and reference differ")


if __name__ == "__main__":
    from stages.cli import launch

    launch("dpo")
