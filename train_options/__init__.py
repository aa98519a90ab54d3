"""Ways to train DiT whose speed and memory are compared: defaults for train.py's options, by name.

Each is also a script here, which does what `train.py --options NAME` does. `features` and `baseline` differ in their
data alone.
"""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "original": {"gradient_checkpointing": "none", "mixed_precision": "no"},
    "baseline": {"gradient_checkpointing": "full", "mixed_precision": "no"},
    "tf32_disabled": {"gradient_checkpointing": "full", "mixed_precision": "no", "no_tf32": True},
    "amp": {"gradient_checkpointing": "full", "mixed_precision": "auto"},
    "features": {"gradient_checkpointing": "full", "mixed_precision": "no"},
}
