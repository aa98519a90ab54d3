"""`torch.compile` of the repeated blocks of the transformer and of T5, in place."""

import torch
from diffusers.models.embeddings import PatchEmbed

from medart_core.pretrained import PixArt

# Of one block: with and without gradient, checkpointing, a second batch size, a second caption length (from which on
# the length is a variable), and T5's first block beside the others. Beyond the limit a block runs uncompiled.
GRAPHS_PER_BLOCK = 32


def enable(model: PixArt, backend: str = "inductor") -> None:
    """Compile each block at its first call; parameters and their names stay what they are, for PEFT's files.

    The blocks of a network share their code, so one graph serves them all; but each graph costs the compiler half a
    minute or more, so this is for long runs on a GPU.
    """
    torch._dynamo.config.recompile_limit = max(GRAPHS_PER_BLOCK, torch._dynamo.config.recompile_limit)
    for network in (model.transformer, model.text_encoder):
        for module in network.modules():
            for block in (*getattr(module, "transformer_blocks", ()), *getattr(module, "block", ())):
                block.compile(backend=backend)
            if isinstance(module, PatchEmbed):
                # Its output is a transposed view, which would make the first block a case of its own.
                module.register_forward_hook(lambda module, inputs, output: output.contiguous())
