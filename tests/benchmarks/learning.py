# ruff: noqa: E501 -- a page of results and its long lines
"""What PPO learns for the CPU time it takes, beside a value model of its own and beside TRL's RLOO and GRPO.

    python -m tests.benchmarks.learning
    python -m tests.benchmarks.learning --seeds 0 --methods ppo,rloo

Starts from the SFT policies and reward models of configs/quickstart.yaml, which must have run for every seed,
with the `ppo` block of that file and the `rloo` and `grpo` blocks of configs/frontier.yaml. Every training is a
process of its own with one thread, and samples equally many replies. The rubric reads them at the end, outside
the time that counts. Writes results/benchmarks/learning.md and .png.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from annotate.statistics import Estimate, mean, paired_difference
from stages.config import load
from stages.errors import UserError
from stages.plan import Plan

RESULTS = Path("results/benchmarks")
QUICKSTART, FRONTIER = "configs/quickstart.yaml", "configs/frontier.yaml"
METHODS = {
    "ppo": "PPO, value head on the policy's trunk (default)",
    "separate": "PPO, value model of its own",
    "rloo": "RLOO (TRL)",
    "grpo": "GRPO (TRL)",
}
LAST = 960
"""Replies at the end of a training that its score is the mean of."""
ROUND = 96
"""Replies in a point of the plot."""

Rows = list[dict[str, Any]]
"""Replies in the order of sampling: `id` of the prompt, `reply`, `cpu` seconds so far, `gold`."""


def run_of(stage: str, seed: int) -> Path:
    plan = Plan(load(QUICKSTART), [seed])
    state = plan.state(plan.node(stage, seed))
    if state.status != "complete":
        raise UserError(f"{stage} of seed {seed} is {state.status}: prefloop run {QUICKSTART} --seeds {seed}")
    return state.path


def learn(method: str, seed: int, folder: str) -> Rows:
    """One training in this process."""
    from stages.online import load as models_of

    sft, rm = (str(run_of(stage, seed) / "model") for stage in ("sft", "rm"))
    records, policy, tokenizer, reward = models_of(sft, rm, str(run_of("prepare", seed) / "records.jsonl"))
    common = {"output_dir": folder, "seed": seed, "report_to": "none", "disable_tqdm": True}
    common |= {"save_strategy": "no", "logging_steps": 10_000, "use_cpu": True}
    stages = load(FRONTIER if method in ("rloo", "grpo") else QUICKSTART).stages
    block = stages["ppo" if method == "separate" else method].trainer  # type: ignore[attr-defined]
    models = (records, policy, tokenizer, reward, common | block)
    if method in ("rloo", "grpo"):
        rows = by_trl(method.upper(), *models)
    else:
        rows = by_ppo(*models, value_model(sft) if method == "separate" else None)
    return scored(rows, {record.id: record for record in records})


def scored(rows: Rows, records: Any) -> Rows:
    from stages.helpdesk import rubric

    return [row | {"gold": float(rubric.score(records[row["id"]].facts, row["reply"]).total)} for row in rows]


def by_ppo(records: Any, policy: Any, tokenizer: Any, reward: Any, args: Any, value: Any) -> Rows:
    from stages.ppo_trainer import PPOConfig, PPOTrainer

    found: Rows = []

    class Recorded(PPOTrainer):
        def keep(self, rows: Any) -> None:
            cpu = time.process_time() - begun
            found.extend({"id": r.id, "reply": r.completion, "cpu": cpu} for r in rows)

    trainer = Recorded(
        policy,
        reward,
        PPOConfig(**args),
        [{"prompt": [m.model_dump() for m in r.prompt], "id": r.id} for r in records],
        processing_class=tokenizer,
        reward_processing_classes=tokenizer,
        value_model=value,
    )
    begun = time.process_time()
    trainer.train()
    return found


def value_model(sft: str) -> Any:
    """SFT's trunk with a head that starts at zero, as the head on the policy does."""
    from torch import nn
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(sft, num_labels=1)
    nn.init.zeros_(model.score.weight)
    return model


def by_trl(kind: str, records: Any, policy: Any, tokenizer: Any, reward: Any, args: Any) -> Rows:
    import trl
    from datasets import Dataset

    from stages import online

    found: Rows = []

    class Recorded(online.Scorer):
        def __call__(self, ids: Any, completion_ids: Any, log_metric: Any, **columns: Any) -> list[float]:
            scores = super().__call__(ids, completion_ids, log_metric, **columns)
            cpu = time.process_time() - begun
            texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
            told = zip(columns["id"], texts, strict=True)
            found.extend({"id": i, "reply": text, "cpu": cpu} for i, text in told)
            return scores

    fixed = {"bf16": False, "activation_checkpointing": False} | online.SAMPLING
    arguments = getattr(trl, f"{kind}Config")(**fixed | args)
    prompts = online.rows(policy, tokenizer, records, arguments.max_completion_length)
    trainer = online.in_own_order(getattr(trl, f"{kind}Trainer"))(
        model=policy,
        reward_funcs=Recorded(reward, tokenizer, online.Settings(policy="", reward="", prompts="")),
        args=arguments,
        train_dataset=Dataset.from_list([p | {"id": r.id} for p, r in zip(prompts, records, strict=True)]),
        processing_class=tokenizer,
    )
    if trainer.ref_model is not None:
        trainer.ref_model.load_state_dict(policy.state_dict())
    begun = time.process_time()
    trainer.train()
    return found


def worker(method: str, seed: int) -> Rows:
    """The training in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "tests.benchmarks.learning",
            "--worker",
            method,
            "--seeds",
            str(seed),
        ]
        subprocess.run([*command, "--folder", folder], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        rows: Rows = json.loads((Path(folder) / "rows.json").read_text())
    print(
        f"{method} seed {seed}: {len(rows)} replies, {rows[-1]['cpu']:.0f} s, gold {last(rows):.2f}",
        flush=True,
    )
    return rows


def last(rows: Rows) -> float:
    return mean([row["gold"] for row in rows[-LAST:]]).value


def curve(rows: Rows) -> tuple[list[float], list[float], list[float]]:
    """(CPU seconds, replies, gold) over the rounds."""
    parts = [rows[i : i + ROUND] for i in range(0, len(rows), ROUND)]
    golds = [mean([row["gold"] for row in part]).value for part in parts]
    return [part[-1]["cpu"] for part in parts], [(i + 1.0) * ROUND for i in range(len(parts))], golds


def seconds_to(gold: float, rows: Rows) -> float | None:
    """CPU seconds until five rounds in a row have reached this mean score together."""
    cpu, _, golds = curve(rows)
    for i in range(len(golds) - 4):
        if sum(golds[i : i + 5]) / 5 >= gold:
            return cpu[i + 4]
    return None


def against(rows: dict[int, Rows], other: dict[int, Rows]) -> Estimate:
    """Gold of the last replies, those to one prompt of one seed paired; clustered by that prompt."""
    pairs = []
    for seed in rows:
        of_other = {row["id"]: row["gold"] for row in other[seed][-LAST:]}
        pairs += [
            (f"{seed}/{r['id']}", r["gold"], of_other[r["id"]])
            for r in rows[seed][-LAST:]
            if r["id"] in of_other
        ]
    names, ours, theirs = zip(*pairs, strict=True)
    return paired_difference(ours, theirs, names)


def plot(found: dict[str, dict[int, Rows]], path: Path) -> None:
    from stages.plots import BLUE, GREEN, ORANGE, RED, save_figure, styled_pyplot

    fig, axes = styled_pyplot().subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for (method, seeds), colour in zip(found.items(), (BLUE, GREEN, ORANGE, RED), strict=False):
        curves = [curve(rows) for rows in seeds.values()]
        for ax, index in zip(axes, (0, 1), strict=True):
            for one in curves:
                ax.plot(one[index], one[2], color=colour, lw=0.7, alpha=0.35)
            middle = [
                [sum(values) / len(values) for values in zip(*(c[i] for c in curves), strict=True)]
                for i in (index, 2)
            ]
            ax.plot(*middle, color=colour, lw=2, label=METHODS[method])
    axes[0].set(
        xlabel="CPU seconds of training, one thread", ylabel="gold score of the replies sampled (rubric)"
    )
    axes[1].set(xlabel="replies sampled")
    axes[1].legend(loc="lower right")
    save_figure(fig, path)


def table(found: dict[str, dict[int, Rows]]) -> list[str]:
    heads = [
        "Method",
        "Gold at the end",
        "of each seed",
        "CPU s",
        "CPU s to the gold that the separate value model ends at",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for method, seeds in found.items():
        golds = [last(rows) for rows in seeds.values()]
        aims = (
            [seconds_to(last(found["separate"][s]), rows) for s, rows in seeds.items()]
            if "separate" in found
            else []
        )
        cells = [
            METHODS[method],
            f"{sum(golds) / len(golds):.2f}",
            ", ".join(f"{gold:.2f}" for gold in golds),
            f"{sum(rows[-1]['cpu'] for rows in seeds.values()) / len(seeds):.0f}",
            ", ".join("not reached" if s is None else f"{s:.0f}" for s in aims),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def page(found: dict[str, dict[int, Rows]], arguments: str) -> str:
    replies = len(next(iter(next(iter(found.values())).values())))
    lines = [
        "# Learning for the time it takes",
        "",
        f"{replies:,} replies in every training, from the quickstart's SFT policy and against its reward model, seeds "
        f"{', '.join(map(str, next(iter(found.values()))))}. Gold at the end: the rubric's mean over the last {LAST} replies "
        "sampled, which are those of training prompts. CPU time of one thread, sampling and scoring included, loading not.",
        "",
        *table(found),
        "",
    ]
    if {"ppo", "separate"} <= found.keys():
        apart = against(found["ppo"], found["separate"])
        lines += [
            f"PPO with the value head on its trunk less PPO with a value model of its own, replies to the same prompt paired: "
            f"{apart.value:+.2f} [{apart.low:+.2f}, {apart.high:+.2f}] ({apart.n:,} pairs, clustered by prompt).",
            "",
        ]
    return "\n".join(
        [
            *lines,
            "The interval says how far other prompts could move the difference; the seeds say how trainings differ.",
            "",
            "![Gold score over CPU seconds and over replies; thin lines are seeds, thick ones their mean.](learning.png)",
            "",
            f"torch {version('torch')}, transformers {version('transformers')}, trl {version('trl')}; "
            f"{platform.machine()}, {os.cpu_count()} cores, one thread each, two trainings at a time.",
            "",
            f"```\nprefloop run {QUICKSTART} --seeds 0,1,2\npython -m tests.benchmarks.learning{arguments}\n```",
            "",
        ]
    )


def main() -> None:
    from concurrent.futures import ThreadPoolExecutor

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    if args.worker:
        rows = learn(args.worker, seeds[0], args.folder)
        (Path(args.folder) / "rows.json").write_text(json.dumps(rows))
        return
    methods = args.methods.split(",")
    with ThreadPoolExecutor(2) as pool:
        waiting = {m: {s: pool.submit(worker, m, s) for s in seeds} for m in methods}
        found = {m: {s: waiting[m][s].result() for s in seeds} for m in methods}
    plot(found, RESULTS / "learning.png")
    (RESULTS / "learning.md").write_text(page(found, "".join(f" {arg}" for arg in sys.argv[1:])))
    print(page(found, ""))


if __name__ == "__main__":
    main()
