"""Adapters of the library peft: trained in the place of all weights, merged into them at the end."""

from typing import Any

from stages.errors import SettingsError, suggest
from stages.libraries import check_block


def with_adapters(model: Any, settings: dict[str, Any] | None) -> Any:
    """`model` with the trainable adapters of a `peft` block; the model itself without one."""
    if settings is None:
        return model
    import peft

    kinds = {str(kind.value): config for kind, config in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    name = str(settings.get("peft_type", "LORA")).upper()
    if name not in kinds:
        raise SettingsError(f"peft.peft_type: unknown type {name}; {suggest(name, kinds)}")
    own = {key: value for key, value in settings.items() if key != "peft_type"}
    check_block("peft", f"peft.{kinds[name].__name__}", own)
    usual = {"target_modules": "all-linear"} if name == "LORA" else {}
    adapted = peft.get_peft_model(model, kinds[name](task_type="CAUSAL_LM", **usual | own))
    if not hasattr(adapted.base_model, "merge_and_unload"):
        raise SettingsError(f"peft.peft_type: {name} cannot be merged into the weights; LORA can")
    return adapted


def merged(model: Any) -> Any:
    """The plain model with its adapters merged, which any later stage can read."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
