"""Visual descriptions of medical images with LLaVA-NeXT: the room of the captioner, still empty."""
