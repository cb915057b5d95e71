"""SFT: teach a base model the task from demonstrations, with the loss on the completions only.

    prefloop sft configs/quickstart.yaml sft.trainer.learning_rate=1e-5

Reads    model    the base model: an earlier stage, a local folder, or a hub id
         data     records with a completion; those of the training split and use `sft` train
Writes   model/   the fine-tuned policy and its tokenizer, for `from_pretrained`

Each optimiser step is normalised over its completion tokens, as in TRL's SFTTrainer, whose loss curve it
reproduces on the same batches (tests/test_sft.py).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from annotate.records import Record, read
from stages.config import KeysOf, Model, Records, StageConfig, UserError
from stages.run import Run

if TYPE_CHECKING:
    from reward.batch import Example

VERSION = 3


class Config(StageConfig):
    model: Model
    data: Records
    max_length: int | None = Field(None, ge=1)
    """Tokens of prompt and completion; longer rows are left out and counted, since a cut row would not teach
    to stop. None: what the model takes."""
    max_new_tokens: int = Field(96, ge=1)
    """Limit of the replies by which self-stopping is measured."""
    trainer: Annotated[dict[str, Any], KeysOf("stages.arguments.EngineArguments")] = {}


def main(config: Config, run: Run) -> None:
    from reward.model import load_policy, load_tokenizer, longest_row, save
    from stages.arguments import arguments
    from stages.engine import Engine, Epochs, Reporting, train
    from stages.objectives import NLL

    rows = [r for r in read(config.data, Record) if r.split == "train" and r.use == "sft"]
    records = [record for record in rows if record.completion]
    if empty := [record.id for record in rows if not record.completion]:
        run.say(f"left out {len(empty)} records without a completion ({empty[0]}, ...)")
    run.record(dropped_empty=len(empty))
    model, tokenizer = load_policy(config.model)
    run.record(added_to_the_checkpoint=load_tokenizer(config.model)[1])
    examples = demonstrations(tokenizer, records, longest_row(model, config.max_length), run)

    args = arguments(run, config.trainer, learning_rate=1e-3, lr_scheduler_type="cosine")
    train(Engine(model, args, NLL(), Epochs(examples, args), [Reporting(run, "SFT")]), run)
    save(model, tokenizer, run.output("model"))
    measure_stopping(model, tokenizer, records, config.max_new_tokens, run)


def demonstrations(tokenizer: Any, records: Sequence[Record], limit: int, run: Run) -> "list[Example]":
    """An example of every demonstration that fits, ending in the stop token; counts the others."""
    from reward.tokens import encode
    from stages.objectives import Demonstration

    examples: list[Example] = []
    long = []
    encoded = encode(tokenizer, [(record.prompt, [record.completion or ""]) for record in records])
    for record, example in zip(records, encoded, strict=True):
        if example.length > limit:
            long.append(record.id)
            continue
        if tokenizer.bos_token_id is not None and example.prompt[:2] == [tokenizer.bos_token_id] * 2:
            raise UserError(
                f"record {record.id} begins with two BOS tokens: the chat template writes one too many"
            )
        if example.completions[0][-1] != tokenizer.eos_token_id:
            raise UserError(f"record {record.id} does not end in the stop token: the model would never stop")
        examples.append(Demonstration(example.prompt, example.completions, record.id))
    run.record(rows=len(examples), dropped_too_long=len(long), dropped_ids=long[:20], truncated=0)
    if not examples:
        raise UserError(
            f"no demonstration to train on: {len(records)} in the training split, {len(long)} longer than "
            f"{limit} tokens"
        )
    share = len(long) / len(records)
    run.gate(
        "demonstrations fit", share <= 0.05, f"{len(long)} of {len(records)} are longer than {limit} tokens"
    )
    return examples


def measure_stopping(model: Any, tokenizer: Any, records: Sequence[Record], limit: int, run: Run) -> None:
    """Share of 32 sampled replies that end by themselves."""
    from reward.model import longest_row
    from reward.sampler import Sampler
    from reward.tokens import prompts_ids

    chosen = [records[i * len(records) // 32] for i in range(32)]
    prompts = prompts_ids(tokenizer, [record.prompt for record in chosen])
    room = longest_row(model) - limit
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
