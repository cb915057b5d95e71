"""Golden tensors from TRL 1.12's PPOTrainer, which test_ppo_goldens.py compares ours with.

    python -m tests.goldens.make_ppo

Runs in the environment of its own that tests/benchmarks/ppo.py makes. One update of TRL's own `train` on a
tiny model is looked at from inside: what it knows of the rollout, every minibatch, and how weights change. It
is run with SGD, whose steps are large enough to clip, with AdamW, and for other gamma and lambda.
"""

import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("ppo.safetensors")

SIZE = {
    "hidden": 8,
    "layers": 2,
    "vocabulary": 24,
    "batch": 16,
    "minibatch": 4,
    "prompt": 6,
    "shortest_prompt": 2,
    "answer": 10,
    "eos": 0.1,
    "heads": 2,
    "intermediate": 16,
    "spread": 0.1,
}
SGD_RATE = 0.5
OTHERS = ((0.9, 0.9), (0.95, 1.0))
"""(gamma, lambda) besides TRL's defaults, 1 and 0.95."""

ROLLOUT = (
    "query_responses", "responses", "logprobs", "ref_logprobs", "scores", "values", "rewards", "advantages",
    "returns", "padding_mask", "padding_mask_p1",
)  # fmt: skip
MINIBATCH = ("mini_batch_inds", "new_logprobs", "vpred", "pg_loss", "vf_loss", "vf_clipfrac")
"""Names of local variables of TRL's `train`."""


def update(gamma: float, lam: float, optimiser: str) -> dict[str, Any]:
    """What one update of TRL did: tensors of the rollout, of its minibatches, weights before and after."""
    import numpy
    import torch
    import trl.experimental.ppo.ppo_trainer as ppo_trainer
    from datasets import Dataset

    from tests.benchmarks.ppo_trl import config_of, trainer_of
    from tests.benchmarks.ppo_worker import Size, classifier_of, policy_of, prompts_of

    size = Size(**SIZE)
    parts = {"policy": policy_of(size), "value": classifier_of(size, 2)}
    parameters = [p for part in parts.values() for p in part.parameters()]
    optimizers: tuple[Any, Any] = (None, None)
    if optimiser == "sgd":
        sgd = torch.optim.SGD(parameters, lr=SGD_RATE)
        optimizers = sgd, torch.optim.lr_scheduler.LambdaLR(sgd, lambda _: 1.0)
    with tempfile.TemporaryDirectory() as folder:
        args = config_of(size, folder, 1, gamma=gamma, lam=lam)
        rows = Dataset.from_dict({"input_ids": prompts_of(size, 2 * size.batch)})
        models = {"model": parts["policy"], "value_model": parts["value"], "ref_model": reference_of(size)}
        trainer = trainer_of(size, args, rows, optimizers=optimizers, **models)
        before = {name: tensors(part) for name, part in parts.items()}
        numpy.random.seed(0)  # TRL's order of the minibatches
        with Seen(ppo_trainer) as seen:
            trainer.train()
    after = {name: tensors(part) for name, part in parts.items()}
    return {"rollout": seen.rollout, "minibatches": seen.minibatches, "before": before, "after": after}


def reference_of(size: Any) -> Any:
    """The policy with smaller weights, so that there is a KL to it."""
    import torch

    from tests.benchmarks.ppo_worker import policy_of

    model = policy_of(size).requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    return model


def tensors(model: Any) -> dict[str, Any]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


class Seen:
    """Looks at the local variables of TRL's `train` wherever it calls one of its masked functions."""

    def __init__(self, module: Any):
        self.module, self.whiten, self.mean = module, module.masked_whiten, module.masked_mean
        self.rollout: dict[str, Any] = {}
        self.minibatches: list[dict[str, Any]] = []

    def __enter__(self) -> "Seen":
        self.module.masked_whiten, self.module.masked_mean = self._whiten, self._mean
        return self

    def __exit__(self, *error: object) -> None:
        self.module.masked_whiten, self.module.masked_mean = self.whiten, self.mean

    def _whiten(self, *args: Any, **kwargs: Any) -> Any:
        known, result = sys._getframe(1).f_locals, self.whiten(*args, **kwargs)
        self.rollout = {name: known[name].clone() for name in ROLLOUT} | {"whitened": result.clone()}
        return result

    def _mean(self, *args: Any, **kwargs: Any) -> Any:
        known, result = sys._getframe(1).f_locals, self.mean(*args, **kwargs)
        if "loss" in known:  # the last of the four calls for a minibatch
            found = {name: copied(known[name]) for name in MINIBATCH}
            self.minibatches.append(found | {"pg_clipfrac": result.clone()})
        return result


def copied(value: Any) -> Any:
    import torch

    return torch.as_tensor(value).detach().clone()


def functions() -> dict[str, Any]:
    """masked_mean, masked_var and masked_whiten of ragged rows, without the hooks of `Seen`."""
    import torch
    from trl.experimental.ppo.ppo_trainer import masked_mean, masked_var, masked_whiten

    generator = torch.Generator().manual_seed(0)
    values = 3 * torch.randn(5, 9, generator=generator) + 2
    mask = torch.arange(9) < torch.tensor([9, 1, 4, 6, 0])[:, None]
    return {
        "functions/values": values,
        "functions/mask": mask,
        "functions/mean": masked_mean(values, mask),
        "functions/var": masked_var(values, mask),
        "functions/whiten": masked_whiten(values, mask),
        "functions/whiten_keeping_mean": masked_whiten(values, mask, shift_mean=False),
    }


def make() -> None:
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    found = functions()
    by_optimiser = {name: update(1.0, 0.95, name) for name in ("sgd", "adamw")}
    sgd, adamw = by_optimiser["sgd"], by_optimiser["adamw"]
    assert all(torch.equal(sgd["rollout"][name], adamw["rollout"][name]) for name in sgd["rollout"])
    orders = [[of["mini_batch_inds"].tolist() for of in run["minibatches"]] for run in (sgd, adamw)]
    assert orders[0] == orders[1]
    found |= {f"rollout/{name}": value for name, value in sgd["rollout"].items()}
    for name in sgd["minibatches"][0]:
        found[f"minibatches/{name}"] = torch.stack([of[name] for of in sgd["minibatches"]])
    for part in ("policy", "value"):
        found |= {f"before/{part}/{name}": value for name, value in sgd["before"][part].items()}
        for optimiser, run in by_optimiser.items():
            for name, value in run["after"][part].items():
                found[f"{optimiser}/{part}/{name}"] = value - run["before"][part][name]
    for gamma, lam in OTHERS:
        seen = update(gamma, lam, "sgd")["rollout"]
        assert torch.equal(seen["rewards"], found["rollout/rewards"])
        found[f"gae/{gamma}/{lam}"] = seen["advantages"]
    clipped = found["minibatches/pg_clipfrac"]
    print(f"{len(clipped)} steps, {float(clipped.mean()):.0%} of tokens clipped", file=sys.stderr)
    versions = ", ".join(f"{name} {version(name)}" for name in ("trl", "torch", "transformers"))
    save_file(
        {name: value.contiguous() for name, value in found.items()}, FILE, metadata={"made by": versions}
    )
    print(f"{FILE}: {FILE.stat().st_size:,} bytes", file=sys.stderr)


if __name__ == "__main__":
    if version("trl") == "1.12.0":
        make()
    else:
        from tests.benchmarks.ppo import trl_python

        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        sys.exit(subprocess.call([trl_python(), "-m", "tests.goldens.make_ppo"], env=environment))
