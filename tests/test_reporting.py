"""Trainers report to the services transformers knows: what PPO logs arrives in TensorBoard and trackio."""

import pytest

from tests.test_ppo_trainer import count_77, setting

LOGGED = ("reward", "kl", "length", "self_stopping", "entropy", "value_loss", "seconds/sampling")


def logged(trainer, name):
    return [(log["step"], log[name]) for log in trainer.state.log_history if name in log]


def test_tensorboard_holds_what_is_logged(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = setting(tmp_path, count_77, report_to="tensorboard", logging_steps=4)
    trainer.train()
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    for name in LOGGED:
        told = [(event.step, event.value) for event in board.Scalars(f"train/{name}")]
        assert [step for step, _ in told] == [4, 8, 12]
        assert told == [(step, pytest.approx(value)) for step, value in logged(trainer, name)]


def test_trackio_holds_what_is_logged(tmp_path, monkeypatch):
    pytest.importorskip(
        "trackio", reason="brings another event loop for the page's server, so not installed here"
    )
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trainer = setting(
        tmp_path, count_77, report_to="trackio", logging_steps=4, project="mine", run_name="one"
    )
    trainer.train()
    rows = SQLiteStorage.get_logs("mine", "one")
    for name in LOGGED:
        told = [(row["train/global_step"], row[f"train/{name}"]) for row in rows if f"train/{name}" in row]
        assert told == [(step, pytest.approx(value)) for step, value in logged(trainer, name)]
