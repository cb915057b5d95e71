"""Every experiment file in configs/ loads, and its blocks for libraries hold only what those know."""

from pathlib import Path

import pytest

from stages.config import STAGES, check_libraries, load, module
from stages.dpo import PARAMETERS

CONFIGS = sorted(Path("configs").glob("*.yaml"))


def test_there_are_the_promised_experiments():
    assert {"quickstart", "smoke", "hh", "frontier", "objectives"} <= {path.stem for path in CONFIGS}


def test_the_frontier_starts_from_the_quickstarts_stages_and_has_every_kind_of_stage():
    frontier, quickstart = load("configs/frontier.yaml"), load("configs/quickstart.yaml")
    for stage in ("prepare", "pretrain", "sft", "sample", "collect", "rm"):
        assert frontier.stages[stage] == quickstart.stages[stage]
    assert set(frontier.kinds.values()) == set(STAGES)
    measured = set(frontier.uses("evaluate")) - {"prepare", "sample", "rm"}
    trained = {"pretrain", "sft", "dpo", "kto", "ppo", "rloo", "grpo"}
    assert measured == {stage for stage, kind in frontier.kinds.items() if kind in trained}


def test_the_objectives_are_all_compared_from_one_policy():
    compared = load("configs/objectives.yaml")
    trained = {stage for stage, kind in compared.kinds.items() if kind == "dpo"}
    assert {compared.stages[stage].policy for stage in trained} == {"sft"}
    assert trained <= set(compared.uses("evaluate"))
    # of pairs, plackett_luce is sigmoid
    assert {compared.stages[stage].objective for stage in trained} == PARAMETERS.keys() - {"plackett_luce"}


def test_the_frontiers_online_methods_draw_as_many_replies_as_ppo(tmp_path):
    from trl import GRPOConfig, RLOOConfig

    from stages.online import online_arguments, sampled
    from tests.tiny import run_in

    stages = load("configs/frontier.yaml").stages
    kinds = {"rloo": RLOOConfig, "rloo-0_3": RLOOConfig, "rloo-48": RLOOConfig, "rloo-448": RLOOConfig}
    for stage, kind in (kinds | {"grpo": GRPOConfig}).items():
        args = online_arguments(stages[stage].trainer, run_in(tmp_path, stage), kind, {})
        as_long = stages[stage.replace("rloo", "ppo").replace("grpo", "ppo")]
        assert sampled(args, args.max_steps) == as_long.trainer["total_episodes"]


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_loads_and_knows_every_key(path: Path):
    experiment = load(path)
    assert experiment.name == path.stem
    assert set(experiment.kinds.values()) <= set(STAGES)
    check_libraries(experiment)


@pytest.mark.parametrize("kind", STAGES)
def test_the_command_in_the_header_of_a_stage_is_valid(kind: str):
    header = module(kind).__doc__ or ""
    commands = [line.split() for line in header.splitlines() if line.startswith(f"    prefloop {kind} ")]
    assert commands
    for _, _, config, *overrides in commands:
        assert kind in load(config, overrides).stages
