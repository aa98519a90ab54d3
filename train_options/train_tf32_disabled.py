"""With recomputed blocks and fp32 products in full precision; images are encoded in every step.

    torchrun --nnodes=1 --nproc_per_node=N train_options/train_tf32_disabled.py --model DiT-XL/2 --data-path DIR

Everything else is as in train.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from medart_core.errors import exit_codes
from train import main

if __name__ == "__main__":
    with exit_codes():
        sys.exit(main("tf32_disabled", __doc__))
