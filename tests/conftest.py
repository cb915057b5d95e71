"""For all tests: no connection leaves the machine, one thread, paths relative to the checkout."""

import gzip
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import filelock
import hypothesis
import pytest

import stages  # noqa: F401 (turns telemetry off, before a library looks whether it is)

if TYPE_CHECKING:
    from tests.postgres import Postgres

ROOT = Path(__file__).parent.parent
GUARD = Path(__file__).parent / "guard"

# Before torch is imported here, and for the processes that tests start. Tiny models gain nothing by a second
# thread, and where other work keeps the cores busy two threads that wait for each other are ten times slower.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(GUARD), os.environ.get("PYTHONPATH")]))
for _name in ("http_proxy", "https_proxy", "all_proxy"):  # a proxy on loopback would be a way out
    for _variable in (_name, _name.upper()):
        os.environ.pop(_variable, None)
os.chdir(ROOT)
# `make test &` in a script starts with Ctrl-C ignored, and the processes that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples every time, and no deadline: these tests also run on slow and busy machines.
hypothesis.settings.register_profile("prefloop", deadline=None, derandomize=True)
hypothesis.settings.load_profile("prefloop")


@pytest.fixture(scope="session", autouse=True)
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that names every connection the guard refused, in this process and those started from it."""
    log = tmp_path_factory.mktemp("guard") / "refused"
    log.touch()
    os.environ["PREFLOOP_GUARD"] = str(log)
    sys.path.insert(0, str(GUARD))
    sys.modules.pop("sitecustomize", None)  # the system's own, loaded at start
    import sitecustomize  # noqa: F401

    sys.path.remove(str(GUARD))
    return log


@pytest.fixture(autouse=True)
def no_connection_leaves_the_machine(guard: Path) -> Iterator[None]:
    """Fails the test that tried, even where the error was swallowed (telemetry does that)."""
    before = guard.read_text()
    yield
    tried = guard.read_text()[len(before) :]
    assert not tried, f"tried to leave the machine: {tried}"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data that lies beside the checkout and is no part of the project."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"real data is not there: {path}")
    return path


@pytest.fixture(scope="session")
def smoke_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs of one whole loop on configs/smoke.yaml, made once through the command line."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers: the first makes the runs, the others wait for them
    runs, made = folder / "smoke", folder / "smoke-is-made"
    with filelock.FileLock(folder / "smoke.lock"):
        if not made.exists():
            command = [sys.executable, "-m", "stages.cli", "run", "configs/smoke.yaml"]
            environment = os.environ | {"PREFLOOP_RUNS": str(runs)}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stdout + done.stderr
            made.touch()
    return runs


@pytest.fixture(scope="session")
def postgres() -> Iterator["Postgres"]:
    """A PostgreSQL server; skips where there is none, and fails under CI."""
    from tests.postgres import server

    with server() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def fresh(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """Gives the URL of a label database that is not there yet: the test runs on SQLite and on PostgreSQL."""
    if request.param == "postgresql":
        database: Callable[[], str] = request.getfixturevalue("postgres").database
        return database
    numbers = itertools.count()
    return lambda: f"sqlite:///{tmp_path}/labels{next(numbers)}.db"


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    """Writes rows (objects, or lines as they stand) to a JSON-lines file and returns its path."""

    def write(*rows: object, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        data = "".join(line + "\n" for line in lines).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
        return str(path)

    return write


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail, in one line on stderr; returns that line."""

    def call(*argv: object, code: int = 1) -> str:
        from stages import cli

        capsys.readouterr()
        assert cli.main([str(word) for word in argv]) == code
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    return call
