"""What a PPO trainer is made of: policy, prompts, reference and value."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from annotate.records import Message
from reward.batch import Example
from reward.model import disable_dropout, load_policy, load_tokenizer, without_gradient
from reward.paths import chosen
from reward.prefix import Prefix
from reward.tokens import batch_of, device_of, forward, grouped, logprobs, prompts_ids
from stages.errors import UserError
from stages.ppo_config import PPOConfig


def policy(model: Any, processing_class: Any) -> tuple[Any, Any]:
    """(model, tokenizer) of what the trainer was given: a model, or the path or hub id of one."""
    if isinstance(model, str):
        loaded, tokenizer = load_policy(model)
        return loaded, processing_class or tokenizer
    return model, processing_class or load_tokenizer(model.name_or_path)[0]


class Prompts:
    """Rows with a `prompt`, text or messages, as token ids; other columns are for the reward functions."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], tokenizer: Any, model: Any, reply: int):
        limit = getattr(model.config, "max_position_embeddings", None)
        self.prompts: list[Any] = []
        self.tokens: list[list[int]] = []
        for number, row in enumerate(rows):
            if not row.get("prompt"):
                raise UserError(f"{_where(number, row)} has no prompt: give it text or messages")
        encoded = _ids(tokenizer, [row["prompt"] for row in rows])
        for number, (row, ids) in enumerate(zip(rows, encoded, strict=True)):
            if limit is not None and len(ids) + reply > limit:
                raise UserError(
                    f"{_where(number, row)}: {len(ids)} tokens and {reply} for the reply exceed the "
                    f"{limit} positions of the model; shorten it, or lower response_length"
                )
            self.prompts.append(row["prompt"])
            self.tokens.append(ids)
        names = dict.fromkeys(name for row in rows for name in row if name != "prompt")
        self.columns = {name: [row.get(name) for row in rows] for name in names}
        self.ids = [str(row.get("id", number)) for number, row in enumerate(rows)]


def _ids(tokenizer: Any, prompts: Sequence[Any]) -> list[list[int]]:
    """Of texts and of messages."""
    chats = [
        [Message(role=m["role"], content=m["content"]) for m in prompt]
        for prompt in prompts
        if not isinstance(prompt, str)
    ]
    of_chats = iter(prompts_ids(tokenizer, chats))
    return [list(tokenizer(p)["input_ids"]) if isinstance(p, str) else next(of_chats) for p in prompts]


def _where(number: int, row: Mapping[str, Any]) -> str:
    return f"row {number} of the dataset" + (f" (id {row['id']})" if "id" in row else "")


class Reference:
    """The policy as it was at the start: what KL is measured from.

    A model of its own; the policy with its adapters off, or with the adapter of that name; where only the
    last layers are trained, a copy of those; and else a frozen copy of the whole.
    """

    def __init__(self, model: Any, ref_model: Any, args: PPOConfig):
        self.policy, self.prefix, self.model = model, None, None
        self.checked = False
        self.adapter = args.ref_adapter_name
        adapted = hasattr(model, "disable_adapter")
        if self.adapter is not None and not (adapted and self.adapter in model.peft_config):
            raise UserError(f"ref_adapter_name: the model has no adapter named {self.adapter}")
        if args.train_layers is not None:
            if adapted:
                raise UserError(
                    "train_layers: adapters choose their own layers (layers_to_transform); leave it out"
                )
            self.prefix = Prefix(model, args.train_layers)
        if ref_model is not None:
            self.model = disable_dropout(ref_model.requires_grad_(False).eval())
        elif not adapted and self.prefix is None:
            self.model = disable_dropout(without_gradient(model))

    def measure(
        self, examples: Sequence[Example], temperature: float
    ) -> tuple[list[list[float]], list[Tensor | None]]:
        """Log-probability of each token under the reference, one completion an example; and where only the
        last layers are trained, the (T, d) states that enter them."""
        if self.prefix is not None:
            return self._from_states(self.prefix, examples, temperature)
        with self._in_place():
            model = chosen(self.model or self.policy, examples)
            model.mixed_precision = getattr(self.policy, "mixed_precision", None)
            found = logprobs(model, examples, temperature)
        return [row for (row,) in found], [None] * len(examples)

    @torch.no_grad()
    def _from_states(
        self, prefix: Prefix, examples: Sequence[Example], temperature: float
    ) -> tuple[list[list[float]], list[Tensor | None]]:
        logps: list[list[float]] = [[] for _ in examples]
        states: list[Tensor | None] = [None] * len(examples)
        chosen(self.policy, examples).eval()
        for group in grouped(self.policy, examples):
            batch = batch_of(self.policy, [examples[i] for i in group])
            if not self.checked:
                prefix.check(batch)
                self.checked = True
            entering = prefix.states(batch)
            with prefix.reference(), prefix.given(entering):
                found, _ = forward(self.policy, batch, temperature)
            for row, (i, of_row) in enumerate(zip(group, batch.split(entering), strict=True)):
                logps[i] = found[row, batch.mask[row]].tolist()
                states[i] = of_row.clone()  # a view would keep the whole batch
        return logps, states

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Where the reference is no model of its own, the policy is it inside."""
        if self.model is not None:
            yield
        elif self.adapter is None:
            with self.policy.disable_adapter():
                yield
        else:
            before = self.policy.active_adapter
            self.policy.set_adapter(self.adapter)
            try:
                yield
            finally:
                self.policy.set_adapter(before)


def add_value(model: Any, value_model: Any, rewards: Any, args: PPOConfig) -> None:
    """Give the policy what tells the value of a state: a head on its trunk, or a model of its own.

    The head starts at zero, so that it leaves the trunk alone at first (Ziegler et al. 2019).
    """
    if value_model is None and args.value_init == "reward":
        value_model = copy.deepcopy(_only_model(rewards)).requires_grad_(True)
    if value_model is not None:
        if value_model.config.num_labels != 1:
            raise UserError(
                f"value_model has {value_model.config.num_labels} labels: give one with num_labels=1"
            )
        model.value_model = disable_dropout(value_model)
        return
    width = model.get_output_embeddings().weight.shape[1]
    model.value_head = nn.Linear(width, 1).to(device_of(model))
    nn.init.zeros_(model.value_head.weight)
    nn.init.zeros_(model.value_head.bias)


def _only_model(rewards: Any) -> Any:
    found = [f.model for f in rewards.functions if getattr(f, "reads_ids", False)]
    if len(found) != 1:
        raise UserError(
            f"value_init=reward needs one reward model of the policy's tokenizer, not {len(found)}: give "
            "value_model, or leave value_init out"
        )
    return found[0]


@contextmanager
def without_value(model: nn.Module) -> Iterator[None]:
    """The model without what `add_value` gave it, as it is saved."""
    name = "value_head" if hasattr(model, "value_head") else "value_model"
    part = getattr(model, name)
    delattr(model, name)
    try:
        yield
    finally:
        setattr(model, name, part)


def value_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Of the value alone: the head on the shared trunk, or the whole value model."""
    part: nn.Module = getattr(model, "value_head", None) or model.value_model  # type: ignore[assignment]
    return list(part.parameters())
