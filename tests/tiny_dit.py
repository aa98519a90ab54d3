"""A DiT that is small enough for tests, and what may happen to its training in a process of its own."""

import os
import signal
from functools import partial
from typing import Any

NAME = "DiT-T/2"


def make_known() -> None:
    """Give train.py the tiny model by name."""
    import models

    models.DiT_models[NAME] = partial(models.DiT, depth=2, hidden_size=32, num_heads=2, patch_size=2)


def die_while_saving(moment: str, count: int) -> None:
    """Kill this process in its saving number `count`, from 0: in the midst of the .pt, or before the manifest."""
    import torch

    from medart_core import checkpoint

    saves, save, seal = [], torch.save, checkpoint.seal

    def saving(state: Any, file: Any) -> None:
        saves.append(file)
        if moment == "midst" and len(saves) > count:
            file.write(b"PK\x03\x04 half of a file")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, file)

    def sealing(*arguments: Any) -> None:
        if moment == "manifest" and len(saves) > count:
            os.kill(os.getpid(), signal.SIGKILL)
        seal(*arguments)

    torch.save, checkpoint.seal = saving, sealing


def die_while_extracting(groups: int) -> None:
    """Kill this process when it has written that many groups, each of them noted as done."""
    from medart_core import feature_store

    write, written = feature_store.Extraction.write, []
    feature_store.FLUSHED = 1

    def writing(self: Any, group: int, moments: Any) -> None:
        if len(written) == groups:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, group, moments)
        written.append(group)

    feature_store.Extraction.write = writing
