"""The rows of the ablation, as data: what each changes in Med-Art, on which set, with which seeds, in which order."""

from typing import Any, NamedTuple

from recipe import OPTIONS

STEPS, IMAGES = 200, 200
QUICK_STEPS, QUICK_IMAGES = 40, 64
SOLVER_STEPS, BATCH = 12, 40  # of the images that are evaluated
EPOCHS = 12  # of the classifier whose features the domain's distance is taken of
PIXELS = {"dermoscopy-patches": 64, "chest-xray": 128}
SHARED = OPTIONS | {
    "caption_column": "text",
    "M_times": 15,
    "N_steps": 5,  # 40 updates with HLDF
    "lr_warmup_steps": 10,
    "checkpointing_steps": 1000,
    "validation_steps": 0,
    "num_validation_images": 0,
    "max_validation_samples": 1,
    "report_to": "none",
}
DIT = {  # the optimiser of nano/demo_dit.py; at 64 px it sees as many patches as PixArt does
    "model": "DiT-S/2", "learning-rate": 5e-4, "warmup-steps": 20, "max-grad-norm": 1, "global-batch-size": 24,
    "mixed_precision": "bf16", "ckpt-every": 1000, "keep-ckpts": 1, "sample-every": 0, "num-samples": 0,
    "report-to": "none",
}  # fmt: skip

# What a row changes in Med-Art (VSG's captions, HLDF with its full gradient, LoRA on the transformer and on T5).
ROWS: dict[str, dict[str, Any]] = {
    "med-art": {},
    "without-hldf": {"no_hldf": True},
    "simple-caption": {"caption_column": "simple_text"},
    "empty-caption": {"caption_column": "none"},
    "without-t5-lora": {"no_text_encoder_lora": True},
    "dora": {"use_dora": True},
    "dit": DIT,
    "unbiased": {"color_loss": "unbiased"},
    "last-k": {"hldf_gradient": "last_k", "hldf_k": 4},
    "sparse": {"hldf_gradient": "sparse", "hldf_k": 4},
    "one-step": {"hldf_gradient": "one_step"},
}


class Row(NamedTuple):
    """One run of the ablation."""

    data: str
    name: str
    seed: int

    def __str__(self) -> str:
        return f"{self.data}/{self.name}-seed-{self.seed}"

    @property
    def options(self) -> dict[str, Any]:
        """Of medart.py, or of train.py."""
        return DIT if self.name == "dit" else SHARED | ROWS[self.name]


def rows(data: str, names: list[str], seeds: range) -> list[Row]:
    """All seeds of one row after the other, but for the pairs of HLDF on and off."""
    return [Row(data, name, seed) for name in names for seed in seeds]


COLOUR, XRAY = PIXELS
XRAY_ROWS = ["med-art", "without-hldf", "simple-caption", "without-t5-lora"]
PLAN = [Row(COLOUR, name, seed) for seed in range(5) for name in ("med-art", "without-hldf")]
PLAN += rows(COLOUR, ["simple-caption", "empty-caption", "without-t5-lora", "dora", "dit"], range(3))
PLAN += [Row(XRAY, name, seed) for seed in range(2) for name in XRAY_ROWS]
PLAN += rows(COLOUR, ["unbiased", "last-k", "sparse", "one-step"], range(3))
PLAN += rows(XRAY, XRAY_ROWS, range(2, 3))
QUICK_PLAN = rows(COLOUR, ["med-art", "without-hldf", "simple-caption", "dit"], range(1))
