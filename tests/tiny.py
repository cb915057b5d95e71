"""Tiny models of several families with one byte-level tokenizer, as folders that `from_pretrained` reads."""

import gc
import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5GemmaConfig,
)

from annotate.records import Judgement, Message, Record, prompt_id, write
from stages.manifest import Manifest
from stages.pretrain import train_tokenizer
from stages.run import Run

gc.freeze()  # every training ends with a collection: spare it what the libraries have loaded

WORDS = ("kettle", "lamp", "pan", "chair", "clock", "toaster", "blanket", "mirror")
TEXTS = [f"Hello Ann, sorry about the {word}. We will send you a new {word} today." for word in WORDS]
POSITIONS = 128
ENCODER_DECODERS = ("t5", "bart", "t5gemma")
FOLDERS = ("llama", "qwen2", "gpt2", "no_pad", "no_template", "eos_is_1")


def tokenizer_of() -> Any:
    """256 bytes, the special tokens, and some merges."""
    return train_tokenizer(TEXTS, 300)


def model_of(family: str, tokenizer: Any, seed: int = 0, scale: float = 0.3) -> Any:
    """Two layers of width 16, fp32; `scale` of the weights decides how far from uniform it predicts."""
    torch.manual_seed(seed)
    spare = 4 if family == "qwen2" else 0  # Qwen2's checkpoints have more embeddings than tokens
    ids = {
        "vocab_size": len(tokenizer) + spare,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "initializer_range": scale,
    }
    if family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=POSITIONS, **ids)
        ).eval()
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": POSITIONS,
    }
    if family == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**sizes, **ids, tie_word_embeddings=True)).eval()
    return LlamaForCausalLM(LlamaConfig(**sizes, **ids)).eval()


def encoder_decoder(family: str, tokenizer: Any) -> Any:
    """One of ENCODER_DECODERS, of two layers of width 16 on each side, fp32."""
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": end}
    config: Any
    if family == "t5":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
        config = T5Config(**sizes, **ids, decoder_start_token_id=ids["pad_token_id"])
    elif family == "bart":  # its positions count from the left
        sides = {"layers": 2, "attention_heads": 2, "ffn_dim": 32}
        sizes = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in sides.items()}
        own = {"d_model": 16, "max_position_embeddings": POSITIONS, "init_std": 0.3, "bos_token_id": None}
        config = BartConfig(**sizes, **own, **ids, forced_eos_token_id=None, decoder_start_token_id=end)
    else:  # a sliding window, capped logits, and no start token but the first of the sequence
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 16}
        side = sizes | heads | ids | {"bos_token_id": 2, "initializer_range": 0.3}
        config = T5GemmaConfig(encoder=side, decoder=side, vocab_size=ids["vocab_size"])
    return AutoModelForSeq2SeqLM.from_config(config).eval()


def save_folder(folder: Path, name: str) -> Path:
    """One of FOLDERS or ENCODER_DECODERS, below `folder`: a local checkpoint as others might bring it."""
    path = folder / name
    tokenizer = tokenizer_of()
    if name == "no_template":
        tokenizer.chat_template = None
    if name in ENCODER_DECODERS:
        model = encoder_decoder(name, tokenizer)
    else:
        model = model_of(name if name in ("qwen2", "gpt2") else "llama", tokenizer)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    if name == "no_pad":  # so that one has to be added, and the embedding grows
        change(path / "tokenizer_config.json", pad_token=None)
        file = path / "tokenizer.json"
        file.write_text(file.read_text().replace("<|pad|>", "<|spare|>"))
    if name == "eos_is_1":  # only the model's config says where a reply ends
        change(path / "tokenizer_config.json", eos_token=None)
        change(path / "config.json", eos_token_id=1)
    return path


def change(path: Path, **settings: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def run_in(path: Path, stage: str = "dpo", seed: int = 0, gate: str = "warn", **inputs: Any) -> Run:
    return Run(path, Manifest(experiment="tiny", stage=stage, kind=stage, seed=seed, inputs=inputs), gate)


def records(count: int, use: str = "sft", split: str = "train", completion: bool = True) -> list[Record]:
    made = []
    for i in range(count):
        prompt = [Message(role="user", content=f"My {WORDS[i % len(WORDS)]} number {i} broke.")]
        text = f"Sorry about the {WORDS[i % len(WORDS)]}." if completion else None
        made.append(Record(id=prompt_id(prompt), split=split, use=use, prompt=prompt, completion=text))
    return made


def judgement(i: int, first: str, second: str, preference: int | None, split: str = "train") -> Judgement:
    prompt = [Message(role="user", content=f"My {WORDS[i % len(WORDS)]} number {i} broke.")]
    return Judgement(
        id=prompt_id(prompt),
        split=split,
        use="preference",
        prompt=prompt,
        completions=[first, second],
        annotator="anna",
        kind="simulated",
        round="one",
        preference=preference,
    )


def rows_file(path: Path, rows: Any) -> str:
    write(path, rows)
    return str(path)


def same_weights(a: Any, b: Any) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
