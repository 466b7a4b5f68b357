"""transformers' classes for every model, imported without packages that only its other uses ask for.

scikit-learn (assisted generation), scipy (losses of object detection) and boto3 (accelerate's SageMaker dialogue) are a
third of what a training's process would import (11.2 s of CPU, 7.4 without, 2026-11-30). What is loaded already stays;
what is imported later is found.
"""

import sys
from typing import Any, cast

NOT_NEEDED = ("sklearn", "scipy", "boto3")

_modules = cast(dict[str, Any], sys.modules)
_absent = [name for name in NOT_NEEDED if name not in _modules]
_modules.update(dict.fromkeys(_absent))  # importlib: a module that is None does not exist
try:
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationMixin,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )
finally:
    for _name in _absent:
        del _modules[_name]

__all__ = ["AutoModelForCausalLM", "AutoTokenizer", "GenerationMixin", "PreTrainedModel", "PreTrainedTokenizerBase"]
