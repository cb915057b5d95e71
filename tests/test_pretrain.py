"""Base model stage: tokenizer, weights, and what it makes of bad text."""

import json
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from annotate.records import Message
from reward.tokens import prompt_ids
from stages import pretrain
from stages.config import UserError
from tests import tiny

SMALL = {"vocabulary": 300, "hidden": 32, "layers": 2, "heads": 2, "positions": 64}
TRAINER = {"max_steps": 30, "per_device_train_batch_size": 4, "warmup_steps": 2, "logging_steps": 1}


def stage(path, text, texts=(), **settings):
    path.mkdir(parents=True, exist_ok=True)
    corpus = path / "corpus.txt"
    corpus.write_bytes(text if isinstance(text, bytes) else text.encode())
    run = tiny.run_in(path / "run", "pretrain")
    torch.manual_seed(0)
    config = pretrain.Config(corpus=str(corpus), texts=list(texts), **SMALL | {"trainer": TRAINER} | settings)
    pretrain.main(config, run)
    return run


CORPUS = "\n\n".join(tiny.TEXTS * 4)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return stage(tmp_path_factory.mktemp("pretrain"), CORPUS)


def test_any_from_pretrained_loads_it(done):
    model = AutoModelForCausalLM.from_pretrained(done.path / "model")
    tokenizer = AutoTokenizer.from_pretrained(done.path / "model")
    assert model.config.model_type == "llama"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert (model.config.pad_token_id, model.config.eos_token_id) == (
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
    )
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) == 300
    ids = prompt_ids(tokenizer, [Message(role="user", content="My lamp broke.")])
    assert tokenizer.decode(ids) == "<|user|>My lamp broke.<|end|><|assistant|>"


def test_it_learns(done):
    lines = [json.loads(line) for line in (done.path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 30 and lines[-1]["loss"] < lines[0]["loss"] - 1
    assert done.manifest.metrics["documents"] == 32


def test_a_given_model_is_trained_on(tmp_path, done):
    """From where the first training ended, with its tokenizer and a loss that goes on from there."""
    shape = {"model": str(done.path / "model"), "positions": 512}
    path = tmp_path / "corpus.txt"
    path.write_text(CORPUS)
    run = tiny.run_in(tmp_path / "run", "pretrain")
    pretrain.main(pretrain.Config(corpus=str(path), trainer=TRAINER, **shape), run)
    first, second = (
        [json.loads(line)["loss"] for line in (where / "metrics.jsonl").read_text().splitlines()]
        for where in (done.path, run.path)
    )
    assert second[0] < first[0] - 1 and second[-1] < first[-1]
    tokenizers = [AutoTokenizer.from_pretrained(where / "model") for where in (done.path, run.path)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()


def test_a_given_model_has_its_own_shape():
    with pytest.raises(ValueError, match="hidden, layers: the given model has its own"):
        pretrain.Config(corpus="x", model="y", hidden=8, layers=1)


def test_the_same_seed_twice_gives_the_same_bytes(tmp_path, done):
    again = stage(tmp_path, CORPUS)
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (again.path / "model" / name).read_bytes() == (done.path / "model" / name).read_bytes()


def test_documents_longer_than_the_model_are_cut_and_no_token_is_lost(tmp_path):
    long = " ".join(tiny.TEXTS)
    run = stage(tmp_path, f"{long}\n\nshort", trainer=TRAINER | {"max_steps": 1})
    tokenizer = AutoTokenizer.from_pretrained(run.path / "model")
    lengths = [len(tokenizer(text)["input_ids"]) for text in (long, "short")]
    assert lengths[0] > 64
    assert run.manifest.metrics["tokens"] == sum(lengths) + 2  # and one stop token for each document


def test_further_texts_are_read(tmp_path):
    (tmp_path / "more.txt").write_text("One more.\n\n\n\nAnd another.\n")
    documents = pretrain.read_documents([str(tmp_path / "more.txt")])
    assert documents == ["One more.", "And another."]
    run = stage(tmp_path / "run", CORPUS, [str(tmp_path / "more.txt")], trainer=TRAINER | {"max_steps": 1})
    assert run.manifest.metrics["documents"] == 34


@pytest.mark.parametrize("superwords", [0, 30])
@given(text=st.text())
def test_every_text_comes_back_byte_for_byte(superwords, text):
    tokenizer = tokenizers(superwords)
    special = any(token in text for token in (pretrain.PAD, pretrain.END, *pretrain.ROLES))
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert special or not set(ids) & set(range(5))


@cache
def tokenizers(superwords):
    return pretrain.train_tokenizer(tiny.TEXTS, 330 + superwords, superwords)


SENTENCES = [
    f"Hello {name}, we will send you {n} lamps. Is it well?" for n, name in enumerate(["Ann", "Bo"] * 9)
]


def spelled(tokenizer, text):
    return [tokenizer.decode(of_token) for of_token in tokenizer(text)["input_ids"]]


def test_superwords_join_whole_words_and_nothing_else():
    """Frequent phrases become one token; digits and punctuation stay what they are without."""
    words, phrases = (pretrain.train_tokenizer(SENTENCES, 320 + count, count) for count in (0, 9))
    new = set(phrases.get_vocab()) - set(words.get_vocab())
    assert "ĠweĠwillĠsendĠyouĠ" in new
    assert {token for token in new if set(token) & set(",.?17")} == {".Ġ"}
    text = "Hello Ann, we will send you 17 lamps. Is it well?"
    joined = spelled(phrases, text)
    ends = [
        {sum(map(len, pieces[: i + 1])) for i in range(len(pieces))}
        for pieces in (spelled(words, text), joined)
    ]
    assert ends[1] - ends[0] == {
        len("Hello Ann, we will send you 17 lamps. ")
    }  # else none where no word ends
    assert len(ends[1]) < len(ends[0])
    assert {"1", "7", ",", ". ", "?"} <= set(joined)


def test_a_sentence_is_written_alike_at_the_start_of_a_text_and_within():
    tokenizer = pretrain.train_tokenizer(SENTENCES, 329, 9)
    pieces = spelled(tokenizer, "We will. Is it well?")
    assert pieces[pieces.index(". ") + 1 :] == spelled(tokenizer, "Is it well?")


def test_with_superwords_no_token_is_only_a_step_on_the_way_to_another():
    """What is left are bytes, and what documents are written with: by phrases, or word by word."""
    words, phrases = (pretrain.train_tokenizer(SENTENCES, 320 + count, count) for count in (0, 9))
    steps = {"Ġse", "Ġsen", "Ġla", "Ġlam"} & set(words.get_vocab())
    assert steps and not steps & set(phrases.get_vocab())
    assert len(phrases) < 329 and len(phrases) % 8 == 0


def test_superwords_take_no_place_of_bytes():
    with pytest.raises(ValueError, match=r"vocabulary 300, 40 of it superwords, .* at least 301"):
        pretrain.Config(corpus="x", vocabulary=300, superwords=40)


def test_no_text(tmp_path):
    with pytest.raises(UserError, match="no text to train a base model on"):
        stage(tmp_path, "\n\n  \n\n")


def test_text_that_is_not_utf8(tmp_path):
    with pytest.raises(UserError, match=r"corpus.txt: not UTF-8 text"):
        stage(tmp_path, b"\xff\xfe\x00")
