"""SFT: teach a base model the task from demonstrations, with the loss on the completions only.

    prefloop sft configs/quickstart.yaml sft.trainer.learning_rate=1e-5

Reads    model    the base model: an earlier stage, a local folder, or a hub id
         data     records with a completion; those of the training split and use `sft` train
Writes   model/   the fine-tuned policy and its tokenizer, for `from_pretrained`

Trained by TRL's SFTTrainer on rows that `reward/tokens.py` has rendered, so that training, sampling and
scoring see the same tokens.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from annotate.records import Record, read
from stages.config import KeysOf, Model, Records, StageConfig, UserError
from stages.run import Run

VERSION = 2


class Config(StageConfig):
    model: Model
    data: Records
    max_length: int | None = None
    """Tokens of prompt and completion; longer rows are left out and counted, since a cut row would not teach
    to stop. None: what the model takes."""
    max_new_tokens: int = 96
    """Limit of the replies by which self-stopping is measured."""
    trainer: Annotated[dict[str, Any], KeysOf("trl.SFTConfig")] = {}


def main(config: Config, run: Run) -> None:
    from datasets import Dataset, disable_progress_bars
    from trl import SFTConfig

    from reward.model import load_policy, load_tokenizer, save
    from stages.engine import Reporting, arguments, train

    records = [r for r in read(config.data, Record) if r.split == "train" and r.use == "sft" and r.completion]
    model, tokenizer = load_policy(config.model)
    run.record(added_to_the_checkpoint=load_tokenizer(config.model)[1])
    limit = min(config.max_length or 10**9, getattr(model.config, "max_position_embeddings", 10**9))
    rows = tokenized(tokenizer, records, limit, run)

    disable_progress_bars()  # ours is there
    args = arguments(
        run,
        config.trainer,
        SFTConfig,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        completion_only_loss=True,  # not what TRL infers for rows that are tokenized already
        max_length=None,
        packing=False,
        bf16=False,
        activation_checkpointing=False,
        train_sampling_strategy="group_by_length",
    )
    trainer = trainer_class()(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Reporting(run, "SFT")],
    )
    check_collated(trainer, tokenizer)
    train(trainer, run)
    save(model, tokenizer, run.output("model"))
    measure_stopping(model, tokenizer, records, config.max_new_tokens, run)


def trainer_class() -> Any:
    """TRL's SFTTrainer, whose batches of similar length depend on seed and epoch alone.

    The sampler it would take draws from torch's global state: a training continued in its second epoch
    would then see other batches than one that was never stopped.
    """
    from trl import SFTTrainer

    class Trainer(SFTTrainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            if self.args.train_sampling_strategy != "group_by_length":
                return super()._get_train_sampler(train_dataset)
            lengths = [len(ids) for ids in (train_dataset or self.train_dataset)["input_ids"]]
            size = self.args.train_batch_size * self.args.gradient_accumulation_steps
            return ByLength(lengths, size, self.args.seed)

    return Trainer


class ByLength:
    """Indices of rows so that batches hold rows of similar length; each epoch has an order of its own."""

    def __init__(self, lengths: list[int], size: int, seed: int):
        self.lengths, self.size, self.seed, self.epoch = lengths, size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        import torch
        from transformers.trainer_pt_utils import get_length_grouped_indices

        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.size, generator=generator))


def tokenized(tokenizer: Any, records: Sequence[Record], limit: int, run: Run) -> list[dict[str, list[int]]]:
    """`input_ids` and `completion_mask` of every demonstration that fits; counts the others."""
    from reward.tokens import completion_ids, prompt_ids

    rows, long = [], []
    for record in records:
        prompt, completion = (
            prompt_ids(tokenizer, record.prompt),
            completion_ids(tokenizer, record.completion or ""),
        )
        ids = prompt + completion
        if len(ids) > limit:
            long.append(record.id)
            continue
        if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
            raise UserError(
                f"record {record.id} begins with two BOS tokens: the chat template writes one too many"
            )
        rows.append({"input_ids": ids, "completion_mask": [0] * len(prompt) + [1] * len(completion)})
    run.record(rows=len(rows), dropped_too_long=len(long), dropped_ids=long[:20], truncated=0)
    if not rows:
        raise UserError(
            f"no demonstration to train on: {len(records)} in the training split, {len(long)} longer than "
            f"{limit} tokens"
        )
    share = len(long) / len(records)
    run.gate(
        "demonstrations fit", share <= 0.05, f"{len(long)} of {len(records)} are longer than {limit} tokens"
    )
    return rows


def check_collated(trainer: Any, tokenizer: Any) -> None:
    """Every row must end in a stop token that carries loss; asked of a batch as the trainer makes it."""
    batch = next(iter(trainer.get_train_dataloader()))
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        last = max(i for i, label in enumerate(labels) if label != -100)
        if labels[last] != tokenizer.eos_token_id or ids[last] != tokenizer.eos_token_id:
            raise UserError("a training row does not end in a trained stop token: the model would never stop")


def measure_stopping(model: Any, tokenizer: Any, records: Sequence[Record], limit: int, run: Run) -> None:
    """Share of 32 sampled replies that end by themselves."""
    from reward.sampler import Sampler
    from reward.tokens import prompt_ids

    chosen = [records[i * len(records) // 32] for i in range(32)]
    prompts = [prompt_ids(tokenizer, record.prompt) for record in chosen]
    room = getattr(model.config, "max_position_embeddings", 10**9) - limit
    fits = [prompt for prompt in prompts if len(prompt) <= room]
    keys = [f"{run.seed}/sft/{i}" for i in range(len(fits))]
    samples = Sampler(model, tokenizer, limit).sample(fits, keys)
    share = sum(sample.stopped for sample in samples) / max(1, len(samples))
    run.record(self_stopping=share)
    run.gate(
        "stops by itself", share >= 0.9, f"{share:.0%} of {len(samples)} replies end within {limit} tokens"
    )


if __name__ == "__main__":
    from stages.cli import launch

    launch("sft")
