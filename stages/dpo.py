"""DPO and its kin: optimise the policy on judgements directly, without a reward model.

    prefloop dpo configs/quickstart.yaml dpo.beta=0.05
    prefloop dpo configs/quickstart.yaml dpo.objective=simpo dpo.gamma=0.8

Reads    policy       where training starts; the same weights, frozen, are the reference
         judgements   comparisons of two replies: the side preferred on average is "chosen", ties are left out
                      but for the objective `ties`; `plackett_luce` also takes rankings of more
Writes   model/       the optimised policy; adapters, if any, are merged into it

stages/objectives.md says what each objective is and when to choose it. Pairs of one prompt that share replies
are one example of a batch (reward/together.py), in which each weighs the same. The reference's
log-probabilities are computed once, of the pairs that training comes to. The first batch must then have the
loss of a policy that is its reference (ln 2 for `sigmoid`).
Pairs of validation and test are measured every `trainer.eval_steps` steps (100 unless set) and at the end.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from annotate.records import Judgement, read
from stages.config import Judgements, KeysOf, Model, StageConfig, UserError
from stages.digests import Digests
from stages.rm import FAULTS, fault, nothing_to_train_on, report, usable, who
from stages.run import Run

if TYPE_CHECKING:
    from reward.batch import Example
    from reward.losses import Comparison
    from stages.objectives import Direct, Pair

VERSION = 4

PARAMETERS = {
    "sigmoid": {"beta": 0.1, "label_smoothing": 0.0, "margin": 0.0},
    "sigmoid_norm": {"beta": 5.0},
    "robust": {"beta": 0.1, "label_smoothing": 0.1},
    "hinge": {"beta": 0.1},
    "ipo": {"beta": 0.1},
    "ties": {"beta": 0.1, "tie": 1.0},
    "simpo": {"beta": 2.0, "gamma": 1.0},
    "orpo": {"beta": 0.1},
    "plackett_luce": {"beta": 0.1},
}
"""What each objective (a function of stages/objectives.py) takes, and what that is unless set."""

REFERENCE_FREE = ("simpo", "orpo")


class Config(StageConfig):
    policy: Model
    judgements: Judgements
    objective: str = "sigmoid"
    """sigmoid (DPO), sigmoid_norm, robust, hinge, ipo, ties, simpo, orpo or plackett_luce."""
    beta: float | None = Field(None, gt=0)
    """Strength of the pull towards the reference; for simpo the scale of rewards, for orpo the weight of the
    odds ratio. None: 0.1, for sigmoid_norm 5, for simpo 2."""
    label_smoothing: float | None = Field(None, ge=0, lt=0.5)
    """sigmoid, robust: share of verdicts taken to be wrong. None: 0, for robust 0.1."""
    margin: float | None = Field(None, ge=0)
    """sigmoid: difference of rewards asked for, per step of judged strength (1..3). None: 0."""
    gamma: float | None = Field(None, ge=0)
    """simpo: difference of rewards asked for. None: 1."""
    tie: float | None = Field(None, gt=0)
    """ties: of two equal replies a share tie / (2 + tie) of the verdicts is a tie. None: 1."""
    sft_weight: float = Field(0.0, ge=0)
    """Weight of the chosen reply's negative log-likelihood per token, added to any objective."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """End when the held-out loss has not fallen in so many evaluations, and keep the best. None: off."""
    max_kl: float | None = Field(None, gt=0)
    """End when held-out replies have lost more than so many nats on average: an estimate of
    KL(reference || policy) if the reference wrote them. None: off."""
    peft: dict[str, Any] | None = None
    """Train adapters instead of all weights: `peft_type` (LORA unless set) and the keys of its configuration
    in the library peft, such as {r: 8, lora_alpha: 16}."""
    max_length: int | None = Field(None, ge=1)
    """Tokens of prompt and reply; longer pairs are left out and counted. None: what the model takes."""
    trainer: Annotated[dict[str, Any], KeysOf("stages.arguments.EngineArguments")] = {}

    @field_validator("objective")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in PARAMETERS:
            raise ValueError(f"needs to be one of {', '.join(PARAMETERS)}")
        return name

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        taken = PARAMETERS[self.objective]
        every = {name for parameters in PARAMETERS.values() for name in parameters}
        for name in sorted(every - taken.keys()):
            if getattr(self, name) is not None:
                raise ValueError(f"objective {self.objective} has no {name}; it has {', '.join(taken)}")
        if self.max_kl is not None and self.objective in REFERENCE_FREE:
            raise ValueError(f"objective {self.objective} has no reference, so max_kl cannot be measured")
        return self

    @property
    def parameters(self) -> dict[str, float]:
        """What the objective takes, with its defaults filled in."""
        given = {name: getattr(self, name) for name in PARAMETERS[self.objective]}
        return PARAMETERS[self.objective] | {name: v for name, v in given.items() if v is not None}


def main(config: Config, run: Run) -> None:
    from reward.model import load_policy, longest_row, save
    from reward.together import together
    from stages.adapters import configuration, merged, with_adapters
    from stages.arguments import arguments
    from stages.engine import Engine, Epochs, Reporting, train
    from stages.held_out import HeldOut
    from stages.objectives import Direct

    adapters = configuration(config.peft)
    rows = read(config.judgements, Judgement)
    trained_on, kept = ([j for j in rows if (j.split == "train") is trains] for trains in (True, False))
    model, tokenizer = load_policy(config.policy)
    limit = longest_row(model, config.max_length)
    pairs = judged_pairs(config, tokenizer, trained_on, limit, run)
    if not pairs:
        raise UserError(nothing_to_train_on(trained_on, run))
    held_out = judged_pairs(config, tokenizer, kept, limit, run, "held_out_")
    if not held_out and (config.early_stopping_patience or config.max_kl):
        raise UserError("no held-out pair to stop by: early_stopping_patience and max_kl need some")
    args = arguments(run, config.trainer, learning_rate=1e-4, lr_scheduler_type="linear", eval_steps=100)
    drawn = drawn_pairs(pairs, args)
    if config.objective not in REFERENCE_FREE:  # which is the policy before training, without adapters
        known = {pair.task: pair for pair in with_reference(model, config.policy, drawn, run)}
        pairs = [known.get(pair.task, pair) for pair in pairs]
        held_out = with_reference(model, config.policy, held_out, run)
    run.record(pairs_trained=len(drawn), parameters=config.parameters)

    model = with_adapters(model, adapters)
    steps = Epochs(together(pairs), args)
    check_guards(config, args.eval_steps, len(steps))
    objective = Direct(config.objective, config.parameters, config.sft_weight)
    check_first_batch(model, objective, next(iter(steps.start(0))), run)
    watch = HeldOut(run, objective, together(held_out), config.early_stopping_patience, config.max_kl)
    reporting = Reporting(run, "DPO", ("loss", "accuracy", "margin"))
    train(Engine(model, args, objective, steps, [watch, reporting]), run)
    watch.finish(model)
    save(merged(model), tokenizer, run.output("model"))
    run.record(labelled_by=who(trained_on))


def judged_pairs(
    config: Config, tokenizer: Any, rows: Sequence[Judgement], limit: int, run: Run, of: str = ""
) -> "list[Pair]":
    """What the objective learns from, best completion first; what it leaves out is counted."""
    if config.objective == "plackett_luce":
        ranked, faults = rankings(tokenizer, rows, limit)
        report(ranked, faults, run, of)
        return ranked
    comparisons, faults = usable(tokenizer, rows, limit)
    report(comparisons, faults, run, of)
    pairs = [oriented(comparison) for comparison in comparisons]
    with_ties = config.objective == "ties"
    used = [pair for pair in pairs if with_ties or pair.strength]
    run.record(**{f"{of}ties_left_out": len(pairs) - len(used)})
    return used


def oriented(comparison: "Comparison") -> "Pair":
    """The pair with the side preferred on average first; of strength 0 where neither is."""
    from stages.objectives import Pair

    counts, total = comparison.counts, sum(comparison.counts)
    lean = sum(count * strength for count, strength in zip(counts, range(-3, 4), strict=True))
    first, second = comparison.completions
    votes = (sum(counts[4:]) / total, counts[3] / total, sum(counts[:3]) / total)
    return Pair(
        comparison.prompt,
        (second, first) if lean < 0 else (first, second),
        votes=votes[::-1] if lean < 0 else votes,
        strength=abs(lean) / total,
        task=comparison.task,
    )


def rankings(
    tokenizer: Any, rows: Sequence[Judgement], limit: int
) -> "tuple[list[Pair], dict[str, list[str]]]":
    """Two or more completions by their mean rank over annotators; as `stages.rm.usable`, and no ties."""
    from reward.tokens import encode
    from stages.objectives import Pair

    examples = []
    faults: dict[str, list[str]] = {name: [] for name in (*FAULTS, "tied")}
    groups = [list(group) for _, group in groupby(sorted(rows, key=lambda j: j.task), key=lambda j: j.task)]
    encoded = encode(tokenizer, [(of_task[0].prompt, of_task[0].completions) for of_task in groups])
    for of_task, ids in zip(groups, encoded, strict=True):
        task, ranks = of_task[0].task, [r for j in of_task if (r := j.ranking or _ranking(j.preference))]
        totals = [sum(of_one) for of_one in zip(*ranks, strict=True)]
        best_first = sorted(range(len(totals)), key=totals.__getitem__)
        example = Pair(ids.prompt, tuple(ids.completions[i] for i in best_first) or ([],), task=task)
        wrong = "no_verdict" if not ranks else fault(example, limit)
        if not wrong and len(set(totals)) < len(totals):
            wrong = "tied"
        if wrong:
            faults[wrong].append(task)
        else:
            examples.append(example)
    return examples, faults


def _ranking(preference: int | None) -> list[int]:
    """As a ranking: the smaller number is the better completion."""
    return [] if preference is None else [-preference, preference]


def drawn_pairs(pairs: "Sequence[Pair]", args: Any) -> "list[Pair]":
    """The pairs that training comes to, sorted by task: in less than a pass it does not come to all."""
    from reward.together import parts, together
    from stages.engine import Epochs

    steps = Epochs(together(pairs), args)
    batches = islice(steps.start(0), steps.per_epoch)
    return sorted((pair for batch in batches for pair in parts(batch)), key=lambda pair: pair.task)


def with_reference(model: Any, policy: str, pairs: "Sequence[Pair]", run: Run) -> "list[Pair]":
    """The pairs with the log-probabilities that `model`, loaded from `policy`, gives their completions."""
    from stages.reference import reference_logps

    if not pairs:
        return []
    given = run.inputs.get("policy")
    digest = given.digest if given else Digests().of(Path(policy))
    logps = reference_logps(model, digest, pairs, [pair.task for pair in pairs], run)
    return [replace(pair, reference=of_pair) for pair, of_pair in zip(pairs, logps, strict=True)]


def check_guards(config: Config, eval_steps: float, steps: int) -> None:
    """What is to end training has to be measured on the way."""
    every = eval_steps if eval_steps >= 1 else math.ceil(eval_steps * steps)  # below 1: a share, for Trainers
    if (config.early_stopping_patience or config.max_kl) and not 0 < every <= steps:
        raise UserError(
            f"early_stopping_patience and max_kl look every trainer.eval_steps = {eval_steps:g} steps, and "
            f"there are {steps}: set it to fewer"
        )


def check_first_batch(model: Any, objective: "Direct", batch: "Sequence[Example]", run: Run) -> None:
    """Its loss is finite and, where there is a reference, that of a policy which is the reference."""
    import torch

    from reward.together import parts
    from reward.tokens import grouped
    from stages.not_finite import not_finite

    plain = replace(objective, sft_weight=0.0)
    with torch.no_grad():
        losses = [float(plain.loss(model, [batch[i] for i in group])[0]) for group in grouped(model, batch)]
    loss = sum(losses) / plain.weight(batch)
    run.record(first_batch_loss=loss)
    if not math.isfinite(loss):
        bad = ", ".join(not_finite(plain, model, batch))
        raise UserError(f"the loss of the first batch is {loss}; of these tasks it is not finite: {bad}")
    expected = plain.start(batch)
    if parts(batch)[0].reference and abs(loss - expected) > 1e-3 * max(1.0, abs(expected)):
        raise UserError(
            f"the first batch has loss {loss:.4f}, not {expected:.4f}: policy and reference differ"
        )


if __name__ == "__main__":
    from stages.cli import launch

    launch("dpo")
