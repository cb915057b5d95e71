"""Settings of PPO: those of the engine, and its own under TRL's names where TRL had them."""

from dataclasses import dataclass, field
from typing import Any, Literal

from stages.arguments import EngineArguments

REFUSED_IN_REWARD = (
    "kl_estimator: only k1 can stand in the reward; there the gradient of {} has nothing to do with that of "
    "the KL, and near the reference all but switches the constraint off. Leave kl_estimator out"
)


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class PPOConfig(EngineArguments):
    """The engine's arguments and the settings of PPO.

    `per_device_train_batch_size * gradient_accumulation_steps` replies make one optimiser step, and
    `num_mini_batches` steps make one pass over a rollout.
    """

    # Rollout
    total_episodes: int = _setting(6000, "Replies sampled over the whole training.")
    response_length: int = _setting(96, "Most tokens of a reply.")
    temperature: float = _setting(1.0, "Divides the logits, in sampling and in training.")
    is_correction: Literal["tis", "mask"] | None = _setting(
        None,
        "Where sampling and training differ (bf16): weigh tokens by their ratio, or mask what is far off.",
    )
    is_threshold: float = _setting(
        2.0, "Largest weight of `tis`; `mask` drops ratios beyond it or its inverse."
    )

    # Reward
    reward_weights: list[float] | None = _setting(  # noqa: RUF009
        None, "One weight for each reward function."
    )
    missing_eos_penalty: float | None = _setting(1.0, "For a reply without stop token.")
    missing_eos_mode: Literal["subtract", "replace"] = _setting(
        "subtract", "Subtract the penalty from the score, or use its negative instead."
    )
    scale_rewards: bool = _setting(False, "Normalise scores by their running mean and standard deviation.")
    reward_clip: float | None = _setting(None, "Scores are clipped to plus and minus this, after scaling.")
    whiten_rewards: bool = _setting(False, "Scale the rewards of tokens to variance 1, keeping their mean.")
    score_slot: Literal["last", "post_eos"] = _setting(
        "last",
        "The score is the reward of a reply's last token, or, as in TRL, of the state after its stop token.",
    )

    # KL
    kl_coef: float = _setting(0.05, "Price of one nat of KL to the reference.")
    kl_estimator: str = _setting("k1", "Estimator of KL in the reward; others than k1 are refused.")
    kl_clip: float | None = _setting(None, "The KL of a token is clipped to plus and minus this.")
    kl_target: float | None = _setting(None, "Nats per reply that kl_coef is steered to. None: it stays.")
    kl_horizon: int = _setting(10_000, "Episodes over which the steering of kl_coef acts.")
    ref_adapter_name: str | None = _setting(None, "Adapter that is the reference, instead of none.")

    # Value
    value_init: Literal["zero", "reward"] = _setting(
        "zero", "Value head on the policy's trunk, starting at zero; or a copy of the reward model."
    )
    vf_coef: float = _setting(0.1, "Weight of the value loss.")
    value_learning_rate: float | None = _setting(None, "Of the value's own parameters. None: learning_rate.")
    critic_warmup: int = _setting(0, "Updates at the start in which the policy loss is left out.")
    gamma: float = _setting(1.0, "Discount.")
    lam: float = _setting(0.95, "Lambda of GAE.")

    # Update
    num_ppo_epochs: int = _setting(4, "Passes over each rollout.")
    num_mini_batches: int = _setting(1, "Optimiser steps in each pass.")
    cliprange: float = _setting(0.2, "Clip of the probability ratio, and of its rise unless cliprange_high.")
    cliprange_high: float | None = _setting(None, "Clip of the ratio's rise, where it differs.")
    dual_clip: float | None = _setting(None, "Bound on the loss where the advantage is negative, such as 3.")
    cliprange_value: float | None = _setting(0.2, "Clip of the value change, or none.")
    target_kl: float | None = _setting(None, "Approx. KL that ends an update early.")
    ratio_threshold: float | None = _setting(None, "Mean ratio that skips a step.")
    train_layers: str | None = _setting(None, "`last:k` trains the last k layers and freezes those below.")
    adam_epsilon: float = 1e-5
    learning_rate: float = 3e-6
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check()
        self.steps_per_update = self.num_ppo_epochs * self.num_mini_batches
        self.mini_batch_size = self.per_device_train_batch_size * self.gradient_accumulation_steps
        self.rollout_size = self.mini_batch_size * self.num_mini_batches
        self.updates = self.total_episodes // self.rollout_size
        if self.updates == 0:
            raise ValueError(
                f"total_episodes={self.total_episodes} is less than one rollout ({self.rollout_size})"
            )

    def _check(self) -> None:
        """Settings that make no sense, before anything is loaded."""
        choices = {
            "missing_eos_mode": ("subtract", "replace"),
            "score_slot": ("last", "post_eos"),
            "value_init": ("zero", "reward"),
            "is_correction": (None, "tis", "mask"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                known = " or ".join(str(value) for value in allowed)
                raise ValueError(f"{name} is {known}, not {getattr(self, name)!r}")
        if self.kl_estimator != "k1":
            raise ValueError(REFUSED_IN_REWARD.format(self.kl_estimator))
        if self.temperature <= 0:
            raise ValueError(f"temperature is above 0, not {self.temperature}")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip is above 1, not {self.dual_clip}")
        if self.train_layers is not None and self.score_slot == "post_eos":
            raise ValueError("train_layers and score_slot=post_eos do not go together: leave one out")
