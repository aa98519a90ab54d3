"""With recomputed blocks in 16 bits, fp16 if the launcher says so, else bf16; images are encoded in every step.

    accelerate launch --mixed_precision fp16 train_options/train_amp.py --model DiT-XL/2 --data-path DIR

Everything else is as in train.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from medart_core.errors import exit_codes
from train import main

if __name__ == "__main__":
    with exit_codes():
        sys.exit(main("amp", __doc__))
