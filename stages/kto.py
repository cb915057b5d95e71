"""KTO: optimise the policy on replies that are good or bad by themselves, without pairs (TRL).

    prefloop kto configs/frontier.yaml kto.trainer.beta=0.3

Reads    policy       where training starts; the same weights, frozen, are the reference
         judgements   comparisons of two replies; the side preferred on average is a good reply, the other a
                      bad one; ties are left out
Writes   model/       the optimised policy

Ethayarajh et al. 2024 (arXiv 2402.01306). The point of reference is the policy's KL, estimated within a batch
from replies that belong to other prompts: batches should not be small. metrics.jsonl: `rewards/margins`
should rise, `kl` is that estimate. The first batch has a loss of 0.5.
"""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from annotate.records import Judgement, read
from stages.config import Judgements, KeysOf, Model, StageConfig, UserError
from stages.rm import comparisons, who
from stages.run import Run

VERSION = 1


class Config(StageConfig):
    policy: Model
    judgements: Judgements
    max_length: int | None = Field(None, ge=1)
    """Tokens of prompt and reply; longer pairs are left out and counted. None: what the model takes."""
    trainer: Annotated[dict[str, Any], KeysOf("trl.KTOConfig")] = {}


def main(config: Config, run: Run) -> None:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    from reward.model import check_decoder, load_policy, longest_row, save
    from stages.arguments import arguments
    from stages.engine import Reporting, train

    class Trainer(KTOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # the rows are tokens already

    judgements = [j for j in read(config.judgements, Judgement) if j.split == "train"]
    model, tokenizer = load_policy(config.policy)
    check_decoder(model, config.policy)
    limit = longest_row(model, config.max_length)
    args = arguments(
        run,
        config.trainer,
        KTOConfig,
        learning_rate=1e-4,
        lr_scheduler_type="linear",
        max_length=None,
        bf16=False,
        activation_checkpointing=False,
    )
    rows = unpaired(tokenizer, judgements, limit, run)
    trainer = Trainer(
        model=model,
        ref_model=load_policy(config.policy)[0],
        args=args,
        train_dataset=Dataset.from_list(arranged(rows, args)),
        processing_class=tokenizer,
        callbacks=[Reporting(run, "KTO", ("loss", "kl", "rewards/margins"))],
    )
    train(trainer, run)
    save(model, tokenizer, run.output("model"))
    run.record(labelled_by=who(judgements))


def unpaired(tokenizer: Any, judgements: Sequence[Judgement], limit: int, run: Run) -> list[dict[str, Any]]:
    """Both replies of every pair with a preferred side, as tokens; pairs without one are counted."""
    rows, ties = [], 0
    for pair in comparisons(tokenizer, judgements, limit, run):
        lean = sum(count * strength for count, strength in zip(pair.counts, range(-3, 4), strict=True))
        ties += lean == 0
        rows += [
            {"prompt_ids": pair.prompt, "completion_ids": reply, "label": (lean > 0) == (side == 0)}
            for side, reply in enumerate(pair.completions)
            if lean
        ]
    run.record(rows=len(rows), ties=ties)
    if not rows:
        raise UserError("nothing to train on: every judgement is a tie")
    return rows


def arranged(rows: Sequence[dict[str, Any]], args: Any) -> list[dict[str, Any]]:
    """The rows in the order of training, each with the reply of its neighbour in the batch, for the KL."""
    import torch

    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed)).tolist()
    size, made = args.per_device_train_batch_size, []
    for start in range(0, len(order), size):
        batch = [rows[i] for i in order[start : start + size]]
        made += [row | {"KL_completion_ids": batch[i - 1]["completion_ids"]} for i, row in enumerate(batch)]
    return made


if __name__ == "__main__":
    from stages.cli import launch

    launch("kto")
