"""PEFT's registry: which config and model class a ``peft_type`` means."""

from __future__ import annotations

from collections.abc import Mapping

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner

from ssh_deploy_train.peft_types import member


def register_methods(methods: Mapping[str, tuple[type[PeftConfig], type[BaseTuner]]]) -> None:
    """Enter ``{type name: (config class, model class)}`` into PEFT's three tables; again is harmless.

    `peft.utils.register_peft_method` does the same for one method but wants a prefix of its own for each, while
    both methods here keep their numbers in tensors of the same names (``ssh_spectrum``, ``ssh_indices``), which is
    what makes one file format serve both.

    Raises:
        RuntimeError: another package took the name.
    """
    for name, (config_class, model_class) in methods.items():
        kind = member(name)
        taken = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
        if taken is not None and (taken.__module__, taken.__name__) != (config_class.__module__, config_class.__name__):
            raise RuntimeError(
                f"PEFT type {name} is already registered by {taken.__module__}.{taken.__name__}; "
                "import only one of the two packages."
            )
        PEFT_TYPE_TO_CONFIG_MAPPING[kind] = config_class
        PEFT_TYPE_TO_TUNER_MAPPING[kind] = model_class
        PEFT_TYPE_TO_PREFIX_MAPPING[kind] = model_class.prefix
