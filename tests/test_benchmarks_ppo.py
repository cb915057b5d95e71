"""The PPO benchmark measures what it says; TRL's side needs an environment of its own and is not run here."""

import io
import json
import sys
from dataclasses import replace

import pytest

from tests.benchmarks.ppo import HEADS, ROWS, SIZES, alternate, line, page
from tests.benchmarks.ppo_growth import gemm_rate, update_time
from tests.benchmarks.ppo_ours import train
from tests.benchmarks.ppo_worker import Size, Turns

TINY = {"hidden": 16, "layers": 2, "vocabulary": 64, "batch": 8, "minibatch": 4, "epochs": 2, "answer": 8}


@pytest.mark.parametrize("mode", ["same", "default", "lora", "frozen"])
def test_a_turn_is_one_update(tmp_path, monkeypatch, mode):
    """Every way of training tells of its updates one by one, and stops where nobody asks for another."""
    told = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    turns = Turns(told, 4)
    with pytest.raises(SystemExit):
        train(Size(**TINY), mode, 3, turns, str(tmp_path))
    costs = [json.loads(row) for row in told.getvalue().splitlines()]
    assert [cost["steps"] for cost in costs] == [4, 4]
    assert all(cost["cpu"] > 0 and cost["memory"] > 0 and 1 <= cost["length"] <= 8 for cost in costs)


def test_sides_take_turns_and_the_page_has_a_row_for_each():
    sides = [("ours", "default"), ("ours", "same")]
    costs = alternate(TINY, sides, 2)
    assert [len(costs[side]) for side in sides] == [2, 2]
    rows = [replace(row, memory_target=0.3) for row in ROWS if row.size == "A"]
    cells = [line(row, costs[sides[1]], costs[sides[0]]) for row in rows]
    assert all(len(row) == len(HEADS) for row in cells)
    text = page(cells, ["A: 1 GFLOP in 1 s, 50% of 2."], " --repeats 2", 2)
    table = [row for row in text.splitlines() if row.startswith("|")]
    assert len(table) == 2 + len(rows) and {row.count("|") for row in table} == {len(HEADS) + 1}
    assert "python -m tests.benchmarks.ppo --repeats 2`" in text and "- A: 1 GFLOP" in text


def test_a_side_with_itself_is_as_fast_as_itself():
    costs = [{"cpu": t, "wall": t, "memory": 1e6, "length": 8.0, "steps": 4} for t in (1.0, 2.0, 4.0)]
    cells = line(ROWS[0], costs, costs)
    assert cells[3] == "**1.00** [1.00, 1.00]" and cells[5] == "1.00" and cells[8] == "1.00"


def test_a_side_that_fails_says_why():
    with pytest.raises(SystemExit, match="nonsense"):
        alternate(TINY, [("ours", "nonsense")], 1)


def test_the_operations_of_an_update_are_counted():
    """At least those of the products with the weights: six for a weight and trained token, two to sample."""
    size = Size(**TINY | {"eos": 0.0, "heads": 2, "intermediate": 32})
    seconds, operations, share = update_time(size)
    tokens = size.batch * (size.prompt - 1 + size.answer)
    weights = size.layers * (4 * 16 * 16 + 3 * 16 * 32)
    assert operations > (6 * size.epochs + 2) * tokens * weights
    assert operations < 2 * (6 * size.epochs + 6) * (tokens * weights + size.batch * size.answer * 16 * 64)
    assert seconds > 0 and 0 < share < 1 and gemm_rate(size, 64) > 1e6


def test_every_row_has_a_size():
    assert {row.size for row in ROWS} == SIZES.keys()
