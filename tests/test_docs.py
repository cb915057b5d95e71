"""Every command that the documentation shows is run, on the smoke settings, or has a reason here not to be.

Commands are the lines of fenced `sh` blocks, and whole `python` blocks. They run in their order and share a
folder of runs; configs/smoke.yaml, the same stages made small, stands in for the quickstart.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

DOCUMENTS = [*map(Path, ("README.md", "CONTRIBUTING.md")), *sorted(Path().glob("*/README.md"))]
DOCUMENTS += [*sorted(Path("stages").glob("*/README.md")), Path("stages/ppo.md")]

NOT_RUN = {
    r"make( \w+)+": "run whole by continuous integration, and by hand from a fresh clone",
    r"PIP_EXTRA_INDEX_URL=.*": "installs",
    r"git clone .*|cd .*": "where the reader is",
    r".*pre-commit install": "changes the checkout",
    r".*pytest.*": "runs these tests",
    r".*annotators=people.*|prefloop annotate .*": "waits for people; tests/test_browser.py drives the page",
    r".*sft\.model=.*": "needs a checkpoint; tests/test_loop.py brings some",
    r".*(configs/hh\.yaml|\.\./shared/).*": "needs real data beside the checkout",
    r".*--publish.*": "writes into results/",
    r"python -m tests\.benchmarks\..*": "trains for minutes; test_benchmarks.py runs small ones",
    r".*--seeds .*": "several times the smoke run; make soak does it",
    r"torchrun .*": "test_parallel.py does it, in make soak",
}
"""What the whole command must match -> why it is not run here."""


def commands(document: Path) -> Iterator[tuple[str, str]]:
    """(language, command) in order."""
    for language, block in re.findall(r"^ *```(\w+)\n(.*?)^ *```", document.read_text(), re.M | re.S):
        if language == "python":
            yield language, block
        elif language in ("sh", "bash", "console"):
            for line in block.replace("\\\n", " ").splitlines():
                line = re.sub(r"(^|\s)#.*|^\s*\$ ", "", line).strip()
                yield from (("sh", part) for part in re.split(r"\s+&&\s+", line) if part)


def reason(command: str) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.fullmatch(pattern, command)), None)


def run(language: str, command: str, runs: Path) -> subprocess.CompletedProcess[str]:
    """With the smoke experiment's file, runs and report in the place of the quickstart's."""
    command = command.replace("configs/quickstart.yaml", "configs/smoke.yaml")
    command = command.replace("runs/quickstart", str(runs / "smoke"))
    report, policy = (next(runs.glob(f"smoke/{stage}/*")) for stage in ("report", "ppo"))
    command = command.replace("results/quickstart", str(report))
    words = [str(policy) if word == "RUN" else word for word in shlex.split(command)]
    if language == "python":
        words = [sys.executable, "-c", command]
    else:
        words[0] = str(Path(sys.executable).parent / Path(words[0]).name)
    environment = os.environ | {"PREFLOOP_RUNS": str(runs)}
    return subprocess.run(
        words, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def runs(smoke_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, since the commands add to the runs and remove some."""
    path = tmp_path_factory.mktemp("docs") / "runs"
    shutil.copytree(smoke_runs, path)
    return path


RUN = [d for d in DOCUMENTS if any(reason(command) is None for _, command in commands(d))]


@pytest.mark.parametrize("document", RUN, ids=str)
def test_documented_commands_work(document: Path, runs: Path):
    for language, command in commands(document):
        if reason(command) is None:
            done = run(language, command, runs)
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
