"""Every experiment file in configs/ loads, and its blocks for libraries hold only what those know."""

from pathlib import Path

import pytest

from stages.config import STAGES, check_libraries, load

CONFIGS = sorted(Path("configs").rglob("*.yaml"))


def test_there_are_the_promised_experiments():
    assert {"quickstart", "smoke", "hh"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_loads_and_knows_every_key(path: Path):
    experiment = load(path)
    assert experiment.name == path.stem
    assert set(experiment.kinds.values()) <= set(STAGES)
    check_libraries(experiment)
