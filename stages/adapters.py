"""Adapters of the library peft: trained in the place of all weights, merged into them at the end."""

import warnings
from typing import Any

from stages.errors import SettingsError, suggest
from stages.libraries import check_block

OURS = {"task_type", "inference_mode"}


def configuration(settings: dict[str, Any] | None, place: str = "peft") -> Any:
    """The configuration that a `peft` block stands for; None without one.

    SettingsError, which names the `place` of the block, if it is none.
    """
    if settings is None:
        return None
    import peft

    kinds = {str(kind.value): config for kind, config in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    name = str(settings.get("peft_type", "LORA")).upper()
    if name not in kinds:
        raise SettingsError(f"{place}.peft_type: unknown type {name}; {suggest(name, kinds)}")
    own = {key: value for key, value in settings.items() if key != "peft_type"}
    for ours in OURS & own.keys():
        raise SettingsError(f"{place}.{ours}: the stage sets it; leave it out")
    check_block(place, f"peft.{kinds[name].__name__}", own)
    usual = {"target_modules": "all-linear"} if name == "LORA" else {}
    if own.get("alora_invocation_tokens"):
        raise SettingsError(
            f"{place}.alora_invocation_tokens: such adapters cannot be merged into the weights"
        )
    try:
        return kinds[name](task_type="CAUSAL_LM", **usual | own)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{place}: {' '.join(str(error).split())}") from None


def with_adapters(model: Any, config: Any) -> Any:
    """`model` with the trainable adapters of a configuration; the model itself where that is None."""
    if config is None:
        return model
    import peft

    with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # of transformers, about peft
        adapted = peft.get_peft_model(model, config)
    if not hasattr(adapted.base_model, "merge_and_unload"):
        raise SettingsError(f"peft.peft_type: {config.peft_type.value} cannot be merged into the weights")
    return adapted


def merged(model: Any) -> Any:
    """The plain model with its adapters merged, which any later stage can read."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
