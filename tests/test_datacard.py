"""The data card counts what was written and what was not."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stages import datacard
from stages.prepare import Config, from_files


def test_the_card_counts_what_was_written(jsonl):
    rows = [{"prompt": f"Question {i}?", "chosen": f"Good {i}.", "rejected": f"Bad {i}."} for i in range(60)]
    path = jsonl(*rows)
    prepared = from_files(Config(data=path), [path])
    records = list(prepared.records.values())
    rows = datacard.account(prepared.read, {"empty reply": [("rows.jsonl", 3), ("rows.jsonl", 2)]})
    source = datacard.source(jsonl({"prompt": "a", "chosen": "b", "rejected": "c", "id": 1}))
    card = datacard.describe([source], rows, records, prepared.judgements, prepared.corpus)
    assert source["columns_not_read"] == ["id"] and len(source["sha256"]) == 64
    assert sum(sum(uses.values()) for uses in card["prompts"].values()) == 60
    assert card["words"]["prompt"] == {"count": 60, "mean": 2.0, "p50": 2, "p95": 2, "max": 2}
    assert card["rows"]["reasons"] == [{"reason": "empty reply", "count": 2, "rows": {"rows.jsonl": [2, 3]}}]
    text = datacard.render(card)
    assert "| 2 | empty reply | rows.jsonl: 2, 3 |" in text
    assert "Of 60 rows 58 were kept and 2 dropped" in text


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60))
def test_lengths_are_nearest_rank_percentiles(counts):
    lengths = datacard._lengths("word " * count for count in counts)
    assert lengths["p95"] == np.percentile(counts, 95, method="inverted_cdf")
    assert lengths["p50"] == np.percentile(counts, 50, method="inverted_cdf")
    assert lengths["max"] == max(counts)
