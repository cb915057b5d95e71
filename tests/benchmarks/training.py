# ruff: noqa: E501 -- a page of results and its long lines
"""Our engine against TRL 1.16 on the same rows, models and batches: CPU time, memory, loss curves.

    python -m tests.benchmarks.training --data ../shared/data/hh-rlhf/harmless-base.jsonl.gz
    python -m tests.benchmarks.training --cases dpo,rm --repeats 3

Each measurement is a process of its own; the sides alternate. Without --data the rows are synthetic, with the
lengths of HH-RLHF's. Writes results/benchmarks/training.md and .png.
"""

import argparse
import json
import math
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

THREADS = 2
RESULTS = Path("results/benchmarks")
Row = tuple[list[int], list[int], list[int]]  # token ids of prompt, chosen, rejected


@dataclass(frozen=True)
class Case:
    task: str  # sft, dpo, rm
    target: str
    examples: int
    hidden: int = 256
    layers: int = 4
    vocabulary: int = 8192
    batch: int = 8
    rows: str = "hh"  # or short: prompts of 16 tokens, answers of 48
    precomputed: bool = False  # the reference's log-probabilities, before the clock starts
    trl: dict[str, Any] = field(default_factory=dict)  # what differs from COMMON
    steps: int = -1
    turns: int = 0  # instead of --repeats


COMMON = {
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "num_train_epochs": 1,
}
TRL = {"bf16": False, "activation_checkpointing": False, "max_length": None}
BEFORE = {"precompute_ref_log_probs": True}

# Rows enough that what happens once, such as our self-check before the first step, is a few percent of the whole.
CASES = {
    "sft, default": Case("sft", ">= 4", 128),
    "sft, packing": Case(
        "sft",
        ">= 2",
        128,
        trl={"packing": True, "max_length": 1024, "per_device_train_batch_size": 1},
        turns=6,
    ),
    "sft, grouped by length": Case("sft", ">= 2", 128, trl={"train_sampling_strategy": "group_by_length"}),
    "dpo": Case("dpo", ">= 5", 64),
    "dpo, reference before": Case("dpo", ">= 5", 64, precomputed=True, trl=BEFORE),
    "dpo, 32 steps for the losses": Case("dpo", "", 256, turns=1),
    "dpo, V 32768, 384x6": Case("dpo", ">= 5", 16, hidden=384, layers=6, vocabulary=32768),
    "rm": Case("rm", ">= 2", 128),
    # The smallest differences, as of packing above: more turns or rows, for an interval that tells.
    "short sft": Case("sft", ">= 1.3", 512, rows="short", turns=5),
    "short dpo": Case("dpo", ">= 1.3", 512, rows="short", turns=5),
    "short rm": Case("rm", ">= 1.3", 1024, rows="short", turns=12),
}


# --- rows -----------------------------------------------------------------------------------------------------


def hh_rows(path: str, count: int) -> list[Row]:
    """The first comparisons of a file, under a byte-level BPE of 8,192 tokens trained on them."""
    from reward.tokens import completion_ids, prompt_ids
    from stages.importers import Dropped, read
    from stages.pretrain import train_tokenizer

    found = [e for _, e in read(path) if not isinstance(e, Dropped) and e.chosen and e.rejected]
    texts = [m.content for e in found for m in e.prompt] + [
        t for e in found for t in (e.chosen, e.rejected) if t
    ]
    tokenizer = train_tokenizer(texts, 8192)
    rows = [
        (
            prompt_ids(tokenizer, e.prompt),
            completion_ids(tokenizer, e.chosen or ""),
            completion_ids(tokenizer, e.rejected or ""),
        )
        for e in found
    ]
    random.Random(0).shuffle(rows)
    return [row for row in rows if len(row[0]) + max(map(len, row[1:])) <= 1024][:count]


def synthetic_rows(count: int) -> list[Row]:
    """Lengths from log-normal fits to HH-RLHF: prompts 105 tokens at the median, replies 38."""
    rng = random.Random(0)

    def ids(median: float, spread: float) -> list[int]:
        size = min(512, max(4, round(rng.lognormvariate(math.log(median), spread))))
        return [rng.randrange(10, 8000) for _ in range(size)]

    return [(ids(105, 0.9), ids(38, 0.9), ids(38, 0.9)) for _ in range(count)]


def short_rows(count: int) -> list[Row]:
    rng = random.Random(1)

    def ids(size: int) -> list[int]:
        return [rng.randrange(10, 8000) for _ in range(size)]

    return [(ids(16), ids(48), ids(48)) for _ in range(count)]


# --- one measurement ------------------------------------------------------------------------------------------


def measure(side: str, case: Case, rows: Sequence[Row]) -> dict[str, Any]:
    """Train once; CPU and wall seconds, tokens, the loss curve, peak memory over what the imports take."""
    import torch
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    transformers.logging.set_verbosity_error()
    train = {"ours": ours, "trl": trl}[side](case)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=case.hidden * 8 // 3,
        num_hidden_layers=case.layers,
        num_attention_heads=max(1, case.hidden // 64),
        num_key_value_heads=max(1, case.hidden // 64),
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        num_labels=1,
    )
    model = (LlamaForSequenceClassification if case.task == "rm" else LlamaForCausalLM)(config)
    with tempfile.TemporaryDirectory() as folder:
        losses, cpu, wall = train(model, rows, folder)
    return {
        "cpu": cpu,
        "wall": wall,
        "losses": losses,
        "memory": max(1, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024,
        "tokens": sum(len(p) + len(c) + (0 if case.task == "sft" else len(p) + len(r)) for p, c, r in rows),
    }


def ours(case: Case) -> Any:
    from reward.batch import Example
    from reward.losses import Comparison, PreferenceLikelihood
    from reward.paths import choose
    from reward.tokens import logprobs
    from stages.arguments import EngineArguments
    from stages.engine import Engine, Epochs
    from stages.objectives import NLL, Direct, Pair

    class InOrder(Epochs):
        def start(self, step: int) -> Iterable[Any]:
            for number in range(step, self.total):
                at = number % self.per_epoch * self.size
                yield self.examples[at : at + self.size]

    def train(model: Any, rows: Sequence[Row], folder: str) -> tuple[list[float], float, float]:
        args = EngineArguments(folder, per_device_train_batch_size=case.batch, max_steps=case.steps, **COMMON)
        clock, start = Clock(), starting()
        if case.task == "sft":
            examples: list[Any] = [Example(p, (c,)) for p, c, _ in rows]
            objective: Any = NLL()
        elif case.task == "rm":
            model.config.reward_reads = "last"
            examples = [Comparison(p, (c, r), (0, 0, 0, 0, 1, 0, 0)) for p, c, r in rows]
            flipped = Comparison(examples[0].prompt, examples[0].completions, (0, 0, 1, 0, 0, 0, 0))
            objective = PreferenceLikelihood(model, [*examples, flipped])  # both sides occur: Bradley-Terry
            model.thresholds.requires_grad_(False)
        else:
            examples = [Pair(p, (c, r)) for p, c, r in rows]
            objective = Direct("sigmoid", {"beta": 0.1, "label_smoothing": 0.0, "margin": 0.0})
        choose(model, examples)  # the engine does so as well, before the clock of training starts
        before = clock.stop()
        if case.task == "dpo":
            reference = [tuple(map(sum, of_pair)) for of_pair in logprobs(model, examples)]
            examples = [replace(e, reference=r) for e, r in zip(examples, reference, strict=True)]
            before = before if case.precomputed else clock.stop()
        engine = Engine(model, args, objective, InOrder(examples, args), [start])
        engine.train()
        cpu, wall = start.clock.stop()
        return losses(engine), before[0] + cpu, before[1] + wall

    return train


def trl(case: Case) -> Any:
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    kinds = {
        "sft": (SFTTrainer, SFTConfig),
        "dpo": (DPOTrainer, DPOConfig),
        "rm": (RewardTrainer, RewardConfig),
    }
    trainer_class, config_class = kinds[case.task]
    settings = TRL | {"per_device_train_batch_size": case.batch, "max_steps": case.steps} | case.trl
    own_order = "packing" in case.trl or "train_sampling_strategy" in case.trl

    class OnOurRows(trainer_class):  # type: ignore[misc, valid-type]
        """Takes the rows as token ids and, unless a setting says otherwise, in their order."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset if case.task == "dpo" else super()._prepare_dataset(dataset, *args, **kwargs)

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return super()._get_train_sampler() if own_order else SequentialSampler(self.train_dataset)

    def train(model: Any, rows: Sequence[Row], folder: str) -> tuple[list[float], float, float]:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=_words(case.vocabulary), pad_token="0", eos_token="1"
        )
        shown = {
            "sft": lambda p, c, r: {"input_ids": p + c, "completion_mask": [0] * len(p) + [1] * len(c)},
            "dpo": lambda p, c, r: {"prompt_ids": p, "chosen_ids": c, "rejected_ids": r},
            "rm": lambda p, c, r: {"chosen_ids": p + c, "rejected_ids": p + r},
        }[case.task]
        more: dict[str, Any] = {"completion_only_loss": True} if case.task == "sft" else {}
        if case.task == "dpo":
            import copy

            more_for_trainer = {"ref_model": copy.deepcopy(model)}
        else:
            more_for_trainer = {}
        start = starting()
        trainer = OnOurRows(
            model=model,
            args=config_class(output_dir=folder, **COMMON, **settings, **more),
            train_dataset=Dataset.from_list([shown(*row) for row in rows]),
            processing_class=tokenizer,
            callbacks=[start],
            **more_for_trainer,
        )
        trainer.train()
        return losses(trainer), *start.clock.stop()

    return train


class Clock:
    def __init__(self) -> None:
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def stop(self) -> tuple[float, float]:
        return time.process_time() - self.cpu, time.perf_counter() - self.wall


def starting() -> Any:
    """A callback whose `clock` runs from the first step of a training on."""
    from transformers import TrainerCallback

    class Start(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.clock = Clock()

    return Start()


def losses(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def _words(vocabulary: int) -> Any:
    """A tokenizer that nothing is tokenized with: TRL asks for one."""
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({str(i): i for i in range(vocabulary)}, unk_token="0"))


# --- all of them ----------------------------------------------------------------------------------------------


def alternate(case: Case, rows: Sequence[Row], repeats: int) -> dict[str, list[dict[str, Any]]]:
    """`repeats` measurements of each side in processes of their own, turn by turn."""
    found: dict[str, list[dict[str, Any]]] = {"trl": [], "ours": []}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"case": vars(case), "rows": rows}, file)
        file.flush()
        for turn in range(repeats):
            for side in ("trl", "ours") if turn % 2 == 0 else ("ours", "trl"):
                command = [sys.executable, "-m", "tests.benchmarks.training", "--worker", side, file.name]
                environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
                output = subprocess.run(command, env=environment, capture_output=True, text=True)
                if output.returncode:
                    sys.exit(output.stderr)
                found[side].append(json.loads(output.stdout.splitlines()[-1]))
    return found


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean of the ratios of the turns and its 95 % interval (Student's t on the logarithms)."""
    import numpy
    from scipy import stats

    logs = numpy.log(ratios)
    mean, error = float(logs.mean()), float(stats.sem(logs)) if len(logs) > 1 else math.nan
    reach = float(stats.t.ppf(0.975, len(logs) - 1)) * error if len(logs) > 1 else math.nan
    return math.exp(mean), math.exp(mean - reach), math.exp(mean + reach)


def line(name: str, case: Case, found: dict[str, list[dict[str, Any]]]) -> list[str]:
    theirs, of_us = found["trl"], found["ours"]
    ratio, low, high = interval([a["cpu"] / b["cpu"] for a, b in zip(theirs, of_us, strict=True)])
    memory = sorted(b["memory"] / a["memory"] for a, b in zip(theirs, of_us, strict=True))[len(of_us) // 2]
    same = len(theirs[0]["losses"]) == len(of_us[0]["losses"]) and not case.trl.keys() & {
        "packing",
        "train_sampling_strategy",
    }
    apart = (
        max(abs(a - b) for a, b in zip(theirs[0]["losses"], of_us[0]["losses"], strict=True))
        if same
        else None
    )

    def median(side: list[dict[str, Any]], what: str) -> float:
        return float(sorted(m[what] for m in side)[len(side) // 2])

    return [
        name,
        f"{case.hidden}x{case.layers}, V {case.vocabulary:,}",
        f"{case.examples} in batches of {case.batch}",
        str(len(of_us)),
        f"{median(theirs, 'cpu'):.1f}",
        f"{median(of_us, 'cpu'):.1f}",
        f"{median(of_us, 'tokens') / median(of_us, 'cpu'):,.0f}",
        f"**{ratio:.2f}**" + (f" [{low:.2f}, {high:.2f}]" if low == low else ""),
        case.target,
        f"{median(theirs, 'wall') / median(of_us, 'wall'):.2f}",
        f"{memory:.2f}",
        "other batches" if apart is None else f"{apart:.0e} over {len(of_us[0]['losses'])} steps",
    ]


HEADS = (
    "case", "model", "rows", "turns", "TRL, CPU s", "ours, CPU s", "ours, tokens per CPU s", "TRL / ours [95 %]",
    "target", "wall ratio", "memory, ours / TRL", "largest difference of losses",
)  # fmt: skip


def gemm_rate() -> float:
    """Floating-point operations per second of a large fp32 product: the best of ten."""
    import torch

    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    best = math.inf
    for _ in range(10):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def step_time(
    width: int = 256, vocabulary: int = 8192, batch: int = 8, length: int = 256
) -> tuple[float, float]:
    """(seconds, floating-point operations) of one DPO step of ours: a prompt of half the length, two replies."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    from reward.paths import choose
    from reward.tokens import grouped
    from stages.objectives import Direct, Pair

    torch.manual_seed(0)
    heads = max(1, width // 64)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=width * 8 // 3,
            num_hidden_layers=4,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=4096,
            pad_token_id=0,
        )
    )
    rng = random.Random(0)

    def ids(size: int) -> list[int]:
        return [rng.randrange(10, 1000) for _ in range(size)]

    pairs = [
        Pair(ids(length // 2), (ids(length // 2), ids(length // 2)), reference=(0.0, 0.0))
        for _ in range(batch)
    ]
    objective = Direct("sigmoid", {"beta": 0.1, "label_smoothing": 0.0, "margin": 0.0})
    choose(model, pairs)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        for group in grouped(model, pairs):
            objective.loss(model, [pairs[i] for i in group])[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    with FlopCounterMode(display=False) as counter:
        step()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return sorted(times)[2], float(counter.get_total_flops())


GROWTH = {
    "length": (64, 128, 256, 512, 1024),
    "batch": (2, 4, 8, 16, 32),
    "vocabulary": (2048, 8192, 32768),
    "width": (64, 128, 256, 512),
}


def growth(path: Path) -> list[str]:
    """How a step grows with each size, as a plot; and lines that say what share of the GEMM rate it reaches."""
    import matplotlib
    import torch

    matplotlib.use("Agg")
    from matplotlib import pyplot

    torch.set_num_threads(THREADS)
    rate = gemm_rate()
    figure, axes = pyplot.subplots(1, len(GROWTH), figsize=(13, 3.4), constrained_layout=True)
    said = [
        f"A product of two 2048x2048 fp32 matrices reaches {rate / 1e9:.0f} GFLOP/s with {THREADS} threads."
    ]
    for axis, (name, sizes) in zip(axes, GROWTH.items(), strict=True):
        found = [step_time(**{name: size}) for size in sizes]
        panel(axis, name, sizes, [seconds for seconds, _ in found])
        shares = ", ".join(
            f"{flops / s / rate:.0%} at {size:,}" for size, (s, flops) in zip(sizes, found, strict=True)
        )
        said.append(f"By {name}: {shares}.")
    axes[0].set_ylabel("seconds a step")
    figure.savefig(path, dpi=120)
    return said


def panel(axis: Any, name: str, sizes: Sequence[int], seconds: Sequence[float]) -> None:
    """Seconds over sizes, both on logarithmic axes; the numbers stand at the points."""
    axis.plot(sizes, seconds, "o-")
    axis.set(xscale="log", yscale="log", xlabel=name)
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.minorticks_off()
    axis.set_yticks([])
    axis.margins(0.18)
    for size, took in zip(sizes, seconds, strict=True):
        axis.annotate(f"{took:.2g}", (size, took), (-5, 5), textcoords="offset points", ha="right")


def page(lines: Sequence[Sequence[str]], share: Sequence[str], arguments: str, data: str) -> str:
    with open("/proc/cpuinfo") as file:
        cpu = next(
            (row.split(":")[1].strip() for row in file if row.startswith("model name")), platform.processor()
        )
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
    table = "\n".join(f"| {' | '.join(row)} |" for row in [HEADS, ["---"] * len(HEADS), *lines])
    settings = ", ".join(f"{name}={value}" for name, value in (COMMON | TRL).items())
    own = "\n".join(f"- {name}: {case.trl}" for name, case in CASES.items() if case.trl)
    return f"""# Training: our engine against TRL

`python -m tests.benchmarks.training{arguments}` wrote this page. {cpu}, {os.cpu_count()} cores, {THREADS} threads,
Linux {platform.release().split("-")[0]}, Python {platform.python_version()}, {versions}, fp32, no activation checkpointing.
Rows: {data}.

{table}

CPU seconds are those of training alone, from its first step on, after imports, model and trainer. What our side does
before that step is added: its self-check and, with dpo, the reference's log-probabilities, but for the latter in the
case that takes them before on both sides. Ratios are of
turns that alternate, with a t interval on their logarithms; memory is the peak over what the imports take. Losses are
compared step by step on the same batches.

TRL's settings, `activation_checkpointing` and `bf16` apart at their defaults where not named: {settings}. And:

{own}

## Share of the machine's GEMM rate

Whole optimiser steps of dpo (256x4, V 8,192, batch 8, prompt and replies of 128 tokens each, one of them varied):

{chr(10).join(f"- {sentence}" for sentence in share)}

![Seconds a step against length, batch, vocabulary and width.](training.png)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="comparisons as the prepare stage reads them; else synthetic rows")
    parser.add_argument("--cases", help="beginnings of names, separated by commas; else all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        side, path = args.worker
        given = json.loads(Path(path).read_text())
        print(json.dumps(measure(side, Case(**given["case"]), given["rows"])))
        return
    chosen = {n: c for n, c in CASES.items() if n.startswith(tuple((args.cases or "").split(",")))}
    most = max(case.examples for case in chosen.values())
    long = hh_rows(args.data, most) if args.data else synthetic_rows(most)
    lines = []
    for name, case in chosen.items():
        rows = (long if case.rows == "hh" else short_rows(most))[: case.examples]
        lines.append(line(name, case, alternate(case, rows, case.turns or args.repeats)))
        print(" | ".join(lines[-1]), flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    told = " ".join(sys.argv[1:])
    data = (
        "HH-RLHF comparisons under a BPE of 8,192 tokens"
        if args.data
        else "synthetic, with HH-RLHF's lengths"
    )
    text = page(lines, growth(RESULTS / "training.png"), f" {told}" * bool(told), data)
    (RESULTS / "training.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
