"""`torch.compile` of the repeated blocks of the transformer and of T5, in place."""

from medart_core.pretrained import PixArt


def enable(model: PixArt, backend: str = "inductor") -> None:
    """Compile each block at its first call; parameters and their names stay what they are, for PEFT's files.

    All blocks of a network share their code, so a few graphs serve them all: one with and one without gradient, each
    once more when a second caption length makes the number of tokens a variable.
    """
    for name in ("transformer_blocks", "block"):
        for network in (model.transformer, model.text_encoder):
            for module in network.modules():
                for block in getattr(module, name, ()):
                    block.compile(backend=backend)
