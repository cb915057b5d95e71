"""Every command that the documentation shows is run, on the smoke settings, or has a reason here not to be.

Commands are the lines of fenced `sh` blocks. Those of one document run in their order and share a folder of
runs; configs/smoke.yaml, the same stages made small, stands in for the quickstart's settings.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

DOCUMENTS = [Path("README.md"), Path("CONTRIBUTING.md"), *sorted(Path().glob("*/README.md"))]
DOCUMENTS += sorted(Path("stages").glob("*/README.md"))

NOT_RUN = {
    r"make( \w+)+": "run whole by continuous integration and by hand from a fresh clone",
    r"git clone .*": "needs the network",
    r"(\.venv/bin/)?pre-commit install": "changes the checkout",
    r"(\.venv/bin/)?pytest.*": "runs the tests themselves",
    r".*annotators=people.*": "waits for a person",
    r"prefloop annotate .*": "serves until it is stopped; tests/test_browser.py drives it",
    r".*(configs/hh\.yaml|\.\./shared/).*": "needs real data beside the checkout",
    r".*--seeds .*": "several times the smoke run; make soak does it",
    r"torchrun .*": "several processes on one machine: make soak does it",
    r"PIP_EXTRA_INDEX_URL=.*": "installs",
    r"results/.*|.*--publish.*": "writes into results/",
}
"""What the whole command must match -> why it is not run here."""


def commands(document: Path) -> list[str]:
    found = []
    for block in re.findall(r"^```(?:sh|bash|console)\n(.*?)^```", document.read_text(), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            command = re.sub(r"\s{2,}#.*|^#.*|^\$ ", "", line).strip()
            found += [part.strip() for part in command.split(" && ") if part.strip()]
    return found


def reason(command: str) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.fullmatch(pattern, command)), None)


DOCUMENTED = [d for d in DOCUMENTS if any(reason(c) is None for c in commands(d))]


@pytest.mark.parametrize("document", DOCUMENTED, ids=str)
def test_documented_commands_work(document: Path, smoke_runs: Path):
    for command in commands(document):
        if reason(command) is None:
            run(command, smoke_runs)


def test_every_reason_is_still_needed():
    shown = [command for document in DOCUMENTS for command in commands(document)]
    unused = [pattern for pattern in NOT_RUN if not any(re.fullmatch(pattern, command) for command in shown)]
    assert not unused


def run(command: str, runs: Path) -> None:
    words = shlex.split(command.replace("configs/quickstart.yaml", "configs/smoke.yaml"))
    words = [word.replace("runs/quickstart", str(runs / "smoke")) for word in words]
    if words[0] == "cd":
        return
    if words[0] in ("python", "prefloop") or words[0].startswith(".venv/bin/"):
        words[0] = str(Path(sys.executable).parent / Path(words[0]).name)
    environment = os.environ | {"PREFLOOP_RUNS": str(runs)}
    done = subprocess.run(
        words, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
