"""What both sides of the PPO benchmark share: sizes, random models, prompts, updates that wait their turn.

Imported in the environment of either side, so it needs torch and transformers alone.
"""

import json
import math
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    TrainerCallback,
)

PAD, EOS = 0, 1
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
TEMPERATURE, KL_COEF, LEARNING_RATE = 0.7, 0.05, 3e-6


@dataclass(frozen=True)
class Size:
    """Of the models, the prompts and answers in tokens, and of one update."""

    hidden: int = 128
    layers: int = 4
    vocabulary: int = 2048
    batch: int = 64
    minibatch: int = 16
    epochs: int = 4
    prompt: int = 16
    shortest_prompt: int = 16
    answer: int = 48
    eos: float = 0.03
    """Probability that an answer ends, at every token."""
    heads: int = 4
    intermediate: int = 512
    spread: float = 0.02
    """Standard deviation of the weights."""

    @property
    def minibatches(self) -> int:
        return self.batch // self.minibatch


def _config(size: Size) -> Any:
    return Qwen2Config(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=size.prompt + size.answer,
        initializer_range=size.spread,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
        num_labels=1,
    )


def policy_of(size: Size) -> Any:
    """Random weights; a bias on the head decides how often an answer ends, and that no padding is drawn."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(_config(size))
    head = nn.Linear(size.hidden, size.vocabulary)
    head.weight = model.lm_head.weight
    with torch.no_grad():
        head.bias.zero_()[PAD] = -1e4
        head.weight[EOS] = 0.0
        spread = size.hidden * (size.spread / TEMPERATURE) ** 2  # variance of the other tokens' logits
        odds = size.vocabulary * math.exp(spread / 2) * size.eos / (1 - size.eos)
        head.bias[EOS] = TEMPERATURE * math.log(odds) if size.eos else -1e4
    model.lm_head = head
    return model


def classifier_of(size: Size, seed: int) -> Any:
    """Random weights with a scalar head: a reward model, or the value model of a side that has one."""
    torch.manual_seed(seed)
    return Qwen2ForSequenceClassification(_config(size))


def tokenizer_of(size: Size) -> Any:
    """Every token is a word, `w` and its number."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(2, size.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def prompts_of(size: Size, count: int) -> list[list[int]]:
    rng = random.Random(0)
    lengths = [rng.randint(size.shortest_prompt, size.prompt) for _ in range(count)]
    return [[rng.randrange(2, size.vocabulary) for _ in range(length)] for length in lengths]


class Turns(TrainerCallback):
    """Ends every update by telling what it cost, and waits for a line before the next may begin.

    An update is all that lies between two ends of it, so nothing that a trainer does is left out. CPU time
    goes on in neither side while it waits.
    """

    def __init__(self, channel: TextIO, steps: int):
        self.channel, self.steps = channel, steps  # the trainer's own steps that make one update
        self.lengths: list[int] = []
        self.optimiser_steps = 0
        self.before = _peak()
        register_optimizer_step_post_hook(self._count)
        self._begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps == 0:
            self._tell()
            if not sys.stdin.readline():
                raise SystemExit
            self._begin()

    def _begin(self) -> None:
        self.lengths.clear()
        self.optimiser_steps = 0
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def _tell(self) -> None:
        cost = {
            "cpu": time.process_time() - self.cpu,
            "wall": time.perf_counter() - self.wall,
            "memory": max(1, _peak() - self.before) * 1024,
            "length": sum(self.lengths) / max(1, len(self.lengths)),
            "steps": self.optimiser_steps,
        }
        print(json.dumps(cost), file=self.channel, flush=True)

    def _count(self, *args: Any) -> None:
        self.optimiser_steps += 1


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def work(train: Callable[..., None]) -> None:
    """The main program of a side: `train(size, mode, updates, turns, folder)` as the command line says.

    What libraries print goes to stderr; stdout is for the costs of the updates.
    """
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    given = json.loads(sys.argv[1])
    turns = Turns(channel, given["trainer_steps"])
    with tempfile.TemporaryDirectory() as folder:
        train(Size(**given["size"]), given["mode"], given["updates"], turns, folder)
