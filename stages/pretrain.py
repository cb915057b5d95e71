"""Base model: a small Llama with its tokenizer, from nothing on plain text; or a given model, trained on.

    prefloop pretrain configs/quickstart.yaml pretrain.hidden=192

Reads    corpus   plain text of the prepare stage, documents separated by blank lines
         texts    further text files of the same form, or with <|endoftext|> between documents
         model    to continue from, with its tokenizer: an earlier stage, a local folder, or a hub id
Writes   model/   tokenizer and weights, for `from_pretrained`
"""

import math
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from stages.config import KeysOf, Model, Reads, StageConfig, UserError
from stages.run import Run

VERSION = 2

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
<|assistant|>{% generation %}{{ message.content }}<|end|>{% endgeneration %}
{%- else -%}
<|{{ message.role }}|>{{ message.content }}<|end|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"""

PAD, END, ROLES = "<|pad|>", "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>")
BYTES = 256 + len((PAD, END, *ROLES))
"""The smallest vocabulary: what any text can be written with."""
END_OF_TEXT = "<|endoftext|>"
PRIVATE = 0xF0000
"""The first of 131,072 characters to which Unicode gives no meaning."""


class Config(StageConfig):
    corpus: Annotated[str, Reads("corpus.txt")]
    texts: list[Annotated[str, Reads("")]] = []
    model: Model | None = None
    seed: int = 0
    """Fixed, so that all seeds of an experiment share one base model."""
    vocabulary: int = 2048
    """How many tokens; with superwords at most."""
    superwords: int = Field(default=0, ge=0)
    """How many tokens of the vocabulary may span words: frequent phrases, read and written in one step.
    Tokens that no document is written with any more are then left out."""
    hidden: int = 128
    layers: int = 2
    heads: int = 4
    positions: int = Field(512, ge=2)
    """Longest sequence the model takes, in tokens; longer documents are cut into pieces."""
    trainer: Annotated[dict[str, Any], KeysOf("stages.arguments.EngineArguments")] = {}

    @model_validator(mode="after")
    def _one_shape(self) -> Self:
        own = sorted(self.model_fields_set & {"vocabulary", "superwords", "hidden", "layers", "heads"})
        if self.model and own:
            raise ValueError(f"{', '.join(own)}: the given model has its own; leave out one or the other")
        return self

    @model_validator(mode="after")
    def _words_first(self) -> Self:
        if self.vocabulary - self.superwords < BYTES:
            raise ValueError(
                f"vocabulary {self.vocabulary}, {self.superwords} of it superwords, leaves no token for "
                f"every byte: make it at least {BYTES + self.superwords}"
            )
        return self


def main(config: Config, run: Run) -> None:
    from reward.model import load_policy, longest_row, save
    from stages.arguments import arguments
    from stages.engine import Engine, Epochs, Reporting, train
    from stages.objectives import NLL, Demonstration

    documents = read_documents([config.corpus, *config.texts])
    if config.model:
        model, tokenizer = load_policy(config.model)
    else:
        tokenizer = train_tokenizer(documents, config.vocabulary, config.superwords)
        model = new_model(config, tokenizer)
    size = longest_row(model, config.positions) - 1
    pieces = [
        (f"document {number}", ids[start : start + size])
        for number, ids in enumerate(tokenizer(documents, add_special_tokens=False)["input_ids"], 1)
        for start in range(0, len(ids), size)
    ]
    end = tokenizer.eos_token_id
    examples = [Demonstration([end], ([*p, end],), name) for name, p in pieces if len(p) < size]
    examples += [Demonstration([end], (p,), name) for name, p in pieces if len(p) == size]

    args = arguments(run, config.trainer, learning_rate=2e-3, warmup_steps=20, lr_scheduler_type="cosine")
    train(Engine(model, args, NLL(), Epochs(examples, args), [Reporting(run, "base model")]), run)
    save(model, tokenizer, run.output("model"))
    tokens = sum(len(example.completions[0]) for example in examples)
    parameters = sum(p.numel() for p in model.parameters())
    run.record(documents=len(documents), tokens=tokens, vocabulary=len(tokenizer), parameters=parameters)


def read_documents(paths: list[str]) -> list[str]:
    documents = []
    for path in paths:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text ({error})") from None
        documents += [block.strip() for block in text.split(_separator(text)) if block.strip()]
    if not documents:
        raise UserError(f"{', '.join(paths)}: no text to train a base model on")
    return documents


def _separator(text: str) -> str:
    """Files that mark the end of each document, as TinyStories does, have blank lines within documents."""
    return END_OF_TEXT if END_OF_TEXT in text else "\n\n"


def train_tokenizer(documents: list[str], vocabulary: int, superwords: int = 0) -> Any:
    """Byte-level BPE: every text can be written, and comes back byte for byte.

    With `superwords`, tokens may span words (`with_superwords`), and there are at most `vocabulary`.
    """
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=with_superwords(documents, vocabulary, superwords)
        if superwords
        else byte_level_bpe(documents, vocabulary),
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def byte_level_bpe(documents: list[str], vocabulary: int, *first: Any) -> Any:
    """Tokens within words; `first` splits texts before words are looked for."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, *first, words])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def with_superwords(documents: list[str], vocabulary: int, count: int) -> Any:
    """Words, and `count` phrases of a clause: fewer tokens say the same, so all that reads or writes them
    takes less (SuperBPE, Liu et al. 2025, arXiv 2503.13423).

    A second BPE training sees the tokens of the first, each as one character. Of what both merged, only
    those tokens stay that documents are written with, as words or as phrases: the others are steps on the
    way to them, two fifths of all on the helpdesk, and would cost every prediction their share of the
    softmax. Merges need those steps; so a text is split into its most probable tokens instead (unigram
    language model: Kudo 2018, arXiv 1804.10959, section 3.2).
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    # A mark takes the space after it along, so that a sentence within a text begins like a text.
    marks = pre_tokenizers.Split(Regex(r"[.:?!] |[.,:;?!\n]"), "isolated")
    words = byte_level_bpe(documents, vocabulary - count, marks)
    digits = pre_tokenizers.Digits(individual_digits=True)
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.pre_tokenizer = pre_tokenizers.Sequence([digits, marks, whole])
    clauses = Counter(_clauses(words, documents))
    tokens = {chr(PRIVATE + i): token for token, i in words.get_vocab().items()}
    phrases = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=len(tokens) + count, initial_alphabet=list(tokens), show_progress=False
    )
    phrases.train_from_iterator(clauses.elements(), trainer)

    used = Counter({tokens[character]: 1 for character in sorted(set().union(*clauses))})
    for encoding, times in zip(phrases.encode_batch(list(clauses)), clauses.values(), strict=True):
        for token in encoding.tokens:
            used["".join(map(tokens.__getitem__, token))] += times
    kept = [PAD, END, *ROLES, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    found = [token for token, _ in used.most_common() if token not in kept]
    kept += found[: max(0, len(found) - (len(kept) + len(found)) % MULTIPLE)]
    total = used.total()
    words.model = models.Unigram([(token, math.log(max(used[token], 1) / total)) for token in kept], unk_id=0)
    return words


MULTIPLE = 8
"""Of how many tokens a vocabulary is made: products of an odd number of rows or columns are slower."""


def _clauses(words: Any, documents: list[str]) -> Iterator[str]:
    """What lies between the marks that no token spans, a character for each token."""
    for encoding in words.encode_batch(documents, add_special_tokens=False):
        for _, clause in groupby(zip(encoding.word_ids, encoding.ids, strict=True), key=itemgetter(0)):
            yield "".join(chr(PRIVATE + i) for _, i in clause)


def new_model(config: Config, tokenizer: Any) -> Any:
    """A Llama with tied embeddings and mimetic attention (Trockman and Kolter 2023, arXiv 2305.09828).

    Queries start equal to keys and the output projection as the transpose of the values', so that attention
    begins by finding tokens like the present one and passing them on: from there a small model learns to copy
    a name from the prompt in far fewer steps than from Gaussian weights.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden,
            intermediate_size=3 * config.hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=config.positions,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            tie_word_embeddings=True,
            initializer_range=0.05,
        )
    )
    with torch.no_grad():
        for attention in (layer.self_attn for layer in model.model.layers):
            torch.nn.init.orthogonal_(attention.q_proj.weight)
            torch.nn.init.orthogonal_(attention.v_proj.weight).mul_(0.5**0.5)
            attention.k_proj.weight.copy_(attention.q_proj.weight)
            attention.o_proj.weight.copy_(attention.v_proj.weight.T)
    return model


if __name__ == "__main__":
    from stages.cli import launch

    launch("pretrain")
