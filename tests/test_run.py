"""The record of a run: status, digests, metrics, gates, what a full disk and a second runner do to it."""

import errno
import json
import math
import os
import time

import numpy as np
import pytest

from annotate.records import DataError
from stages.digests import Digests
from stages.errors import UserError
from stages.manifest import load_manifest, replace
from stages.run import Manifest, Run, locked


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run", Manifest(experiment="toy", stage="one", kind="train", seed=3))


def again(run: Run, **options) -> Run:
    return Run(run.path, Manifest(experiment="toy", stage="one", kind="train"), **options)


def test_a_finished_block_is_a_complete_run(run):
    with run.recorded():
        assert load_manifest(run.path).status == "running"
        run.output("rows.jsonl").write_text("a\n")
        (run.output("model") / "deep").mkdir(parents=True)
        (run.output("model") / "deep" / "weights").write_bytes(b"12345")
        run.record(accuracy=np.float64(0.5), rows=7, names=("a", "b"), fine=True)
    found = load_manifest(run.path)
    assert found.status == "complete" and found.error is None and found.seed == 3
    assert found.metrics == {"accuracy": 0.5, "rows": 7}
    assert found.facts == {"names": ["a", "b"], "fine": True}
    assert found.outputs["rows.jsonl"].files == {"rows.jsonl": 2}
    assert found.outputs["model"].files == {"model/deep/weights": 5}
    assert found.finished >= found.started and found.wall_seconds > 0
    assert found.peak_memory_bytes > 10_000_000
    assert found.hardware["cores"] >= 1 and found.packages["pydantic"]


def test_a_number_that_is_none_survives_the_record(run):
    with run.recorded():
        run.record(loss=math.nan, best=math.inf)
    found = load_manifest(run.path).metrics
    assert math.isnan(found["loss"]) and found["best"] == math.inf
    json.loads((run.path / "manifest.json").read_text(), parse_constant=pytest.fail)


def test_an_announced_output_that_is_not_there_fails_the_run(run):
    with pytest.raises(UserError, match="one: did not write model"), run.recorded():
        run.output("model")
    assert load_manifest(run.path).status == "failed"


@pytest.mark.parametrize("error", [UserError("bad rows"), DataError("bad rows")])
def test_an_error_of_the_users_is_one_line_with_the_stage(run, error):
    with pytest.raises(UserError, match=r"\Aone: bad rows\Z"), run.recorded():
        raise error
    assert load_manifest(run.path).error == "bad rows"
    assert not (run.path / "traceback.txt").exists()


def test_an_unforeseen_error_is_one_line_that_names_the_traceback(run):
    with pytest.raises(UserError) as caught, run.recorded():
        [][3]
    assert "IndexError: list index out of range" in str(caught.value)
    report = run.path / "traceback.txt"
    assert str(report) in str(caught.value) and "[][3]" in report.read_text()
    assert load_manifest(run.path).status == "failed"


def test_ctrl_c_leaves_an_interrupted_run(run):
    with pytest.raises(KeyboardInterrupt), run.recorded():
        raise KeyboardInterrupt
    assert load_manifest(run.path).status == "interrupted"


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "x"), RuntimeError("I/O error: No space left on device (os error 28)")],
    ids=["os", "library"],
)
def test_a_full_disk_is_one_line_that_names_the_folder(run, error):
    with pytest.raises(UserError, match="no space left on the disk") as caught, run.recorded():
        raise error
    assert str(run.path) in str(caught.value)


def test_a_disk_too_full_for_the_record_still_says_so(run, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="no space left on the disk"), run.recorded():
        monkeypatch.setattr(Manifest, "save", full)
        full()
    assert load_manifest(run.path).status == "running"  # and since nobody holds its lock, it counts as killed


def test_replacing_a_file_keeps_the_old_one_when_it_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / "manifest.json"
    replace(path, "old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        replace(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["manifest.json"]


def test_a_failed_gate_stops_or_is_marked(run):
    with pytest.raises(UserError, match=r"check failed: good: 3 of 10 \(one.gate=warn"), run.recorded():
        run.gate("good", False, "3 of 10")
    assert not load_manifest(run.path).gates["good"].passed
    lenient = again(run, gate="warn")
    with lenient.recorded():
        lenient.gate("good", np.bool_(False), "3 of 10")
    found = load_manifest(run.path)
    assert found.status == "complete" and not found.gates["good"].passed


def test_metrics_are_lines_and_a_resumed_run_forgets_what_went_beyond_its_checkpoint(run):
    for step in range(4):
        run.log(step=step, loss=np.float32(step))
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed here
    resumed = again(run)
    resumed.log(step=2, loss=20.0)
    resumed.log(step=3, loss=30.0)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(0, 0), (1, 1), (2, 20), (3, 30)]


def test_only_one_owner(tmp_path):
    one, other = locked(tmp_path / "run"), locked(tmp_path / "run")
    with one, pytest.raises(UserError, match="another prefloop is at work on it"), other:
        pass
    with locked(tmp_path / "run"):
        pass


def test_a_helping_process_writes_nothing_into_the_run(run, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    helper = again(run)
    with run_of_rank_0(run), helper.recorded():
        path = helper.output("model/weights")
        path.write_text("mine")
        helper.log(step=1, loss=1.0)
    assert not path.exists() and not path.is_relative_to(run.path)
    assert not (run.path / "model").exists() and not (run.path / "metrics.jsonl").exists()


def run_of_rank_0(run):
    run.manifest.status = "complete"
    run.manifest.save(run.path)
    return locked(run.path)


def test_digests_depend_on_names_and_content_alone(tmp_path):
    for folder, order in (("a", "xy"), ("b", "yx")):
        (tmp_path / folder).mkdir()
        for name in order:
            (tmp_path / folder / name).write_text(name)
    digests = Digests()
    assert digests.of(tmp_path / "a") == digests.of(tmp_path / "b")
    (tmp_path / "b" / "x").rename(tmp_path / "b" / "z")
    assert digests.of(tmp_path / "a") != digests.of(tmp_path / "b")
    with pytest.raises(UserError, match="cannot be read"):
        digests.of(tmp_path / "none")


def test_remembered_digests_notice_a_change(tmp_path):
    path, store = tmp_path / "data", tmp_path / "runs" / "digests.json"
    path.write_text("one")
    settled = time.time() - 60
    os.utime(path, (settled, settled))
    first = Digests(store)
    one = first.of(path)
    first.save()
    assert list(json.loads(store.read_text())) == [str(path)]
    assert Digests(store).of(path) == one
    path.write_text("two")
    assert Digests(store).of(path) == Digests().of(path) != one


def test_a_fresh_file_is_not_remembered_since_its_next_change_could_have_the_same_time(tmp_path):
    (tmp_path / "data").write_text("one")
    digests = Digests(tmp_path / "digests.json")
    digests.of(tmp_path / "data")
    digests.save()
    assert not (tmp_path / "digests.json").exists()


def test_a_manifest_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="no manifest of this version"):
        load_manifest(tmp_path)


def test_plain_lines_of_progress_are_rare_and_say_what_is_left(run, monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with run.progress("training", total=101, unit="steps") as bar:
        bar.advance(1)  # from an earlier attempt
        for _ in range(60):
            clock[0] += 0.5
            bar.advance(1, loss=0.25)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "one: training 61/101 steps, loss 0.25, 2 steps/s, 0:20 left"
    assert 5 <= len(lines) <= 6
