"""What training does to pairs it does not train on: measured on the way, and a reason to stop.

Everything is decided by the Trainer's own history, which its checkpoints keep: a run that is continued stops
where an uninterrupted one does.
"""

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from reward.batch import Example
from reward.parallel import wait
from reward.paths import chosen
from reward.together import parts
from reward.tokens import grouped
from stages.objectives import Direct
from stages.run import Run, is_writer


@torch.no_grad()
def measure(model: Any, objective: Direct, pairs: Sequence[Example]) -> dict[str, float]:
    """The means over `pairs` of the loss and of what training logs beside it."""
    sums: Counter[str] = Counter()
    training = model.training
    model.eval()
    for group in grouped(model, pairs):
        loss, metrics = objective.loss(model, [pairs[i] for i in group])
        for name, value in ({"loss": loss} | metrics).items():
            sums[f"held_out_{name}"] += float(value)  # type: ignore[assignment]
    model.train(training)
    return {name: total / objective.weight(pairs) for name, total in sums.items()}


class HeldOut(TrainerCallback):
    """Measures held-out pairs every `eval_steps` steps; ends training by `patience` or `max_kl`.

    `max_kl` bounds the mean of log(reference / policy), in nats, over the held-out replies. Replies that the
    reference sampled, as those of `sample` are, make it an estimate of KL(reference || policy).
    """

    def __init__(
        self,
        run: Run,
        objective: Direct,
        pairs: Sequence[Example],
        patience: int | None,
        max_kl: float | None,
    ):
        self.run, self.objective, self.pairs = run, objective, pairs
        self.patience, self.max_kl = patience, max_kl
        self.best = run.path / "best.safetensors"
        self.last: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.pairs:
            chosen(model, self.pairs)  # now, not on the way: a run that is continued takes the same path

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.pairs or not state.eval_steps or state.global_step % state.eval_steps:
            return
        found = measure(model, self.objective, self.pairs)
        state.log_history.append({"step": state.global_step} | found)
        self.run.log(step=state.global_step, **found)
        history = [line for line in state.log_history if "held_out_loss" in line]
        if self.patience is not None and found["held_out_loss"] <= min(h["held_out_loss"] for h in history):
            self._keep(model)
        if why := self.reason(history):
            self.run.say(f"stopped after step {state.global_step}: {why}")
            self.run.record(stopped_early=why)
            control.should_training_stop = True
            control.should_save = False  # a run continued from this step would train on

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logged = [line for line in state.log_history if "logps_chosen_change" in line]
        self.last = {f"held_out_{name}": value for name, value in logged[-1].items()} if logged else {}

    def reason(self, history: Sequence[dict[str, float]]) -> str:
        """Why to stop after the last of these measurements; empty if there is no reason."""
        losses = [line["held_out_loss"] for line in history]
        if self.patience is not None and len(losses) - 1 - losses.index(min(losses)) >= self.patience:
            return f"the held-out loss has not fallen in {self.patience} evaluations"
        if self.max_kl is not None and (kl := drift(history[-1])) > self.max_kl:
            return f"held-out replies lost {kl:.2f} nats on average, more than max_kl {self.max_kl:g}"
        return ""

    def finish(self, model: Any) -> None:
        """Return to the best weights, if `patience` is to keep them; record where training has led."""
        found = measure(model, self.objective, self.pairs) if self.pairs else {}
        if self.patience is not None and self.best.exists():
            last = _trainable(model)
            _set(model, load_file(self.best))
            if (best := measure(model, self.objective, self.pairs))["held_out_loss"] < found["held_out_loss"]:
                found = best
            else:
                _set(model, last)
            wait()  # until all have read it
            self.best.unlink(missing_ok=True)
        self.run.record(**found, held_out_pairs=len(parts(self.pairs)))
        if found and self.max_kl is not None and (kl := drift(found)) > self.max_kl:
            self.run.record(beyond_max_kl=kl)
            self.run.say(
                f"in the end held-out replies have lost {kl:.2f} nats on average, more than max_kl "
                f"{self.max_kl:g}: to stop closer to it, set trainer.eval_steps lower"
            )
        if line := falls(found or self.last):
            self.run.record(chosen_falls=line)
            self.run.say(line)

    def _keep(self, model: Any) -> None:
        if is_writer():
            draft = self.best.with_suffix(".draft")
            save_file(_trainable(model), draft)
            os.replace(draft, self.best)


def drift(means: dict[str, float]) -> float:
    """Nats that chosen and rejected replies have lost on average."""
    return -(means["held_out_logps_chosen_change"] + means["held_out_logps_rejected_change"]) / 2


def falls(means: dict[str, float]) -> str:
    """What to think of chosen replies that become less likely; empty if they do not."""
    chosen = means.get("held_out_logps_chosen_change", 0.0)
    if round(chosen, 1) >= 0:
        return ""
    rejected = means["held_out_logps_rejected_change"]
    said = f"chosen replies changed by {chosen:.2f} nats, rejected ones by {rejected:.2f}: "
    if rejected < chosen:
        return said + "usual, since only their difference is trained; sft_weight holds the chosen up"
    return said + "the chosen fall more; lower trainer.learning_rate or raise beta"


def _trainable(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def _set(model: Any, weights: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.copy_(weights[name])
