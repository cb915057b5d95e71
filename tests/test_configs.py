"""Every experiment file in configs/ loads, and its blocks for libraries hold only what those know."""

from pathlib import Path

import pytest

from stages.config import STAGES, check_libraries, load, module

CONFIGS = sorted(Path("configs").rglob("*.yaml"))


def test_there_are_the_promised_experiments():
    assert {"quickstart", "smoke", "hh"} <= {path.stem for path in CONFIGS}


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
