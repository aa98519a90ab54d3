"""With recomputed blocks on features that extract_features.py has made, fp32 with TF32 products.

    torchrun --nnodes=1 --nproc_per_node=N train_options/train_features.py --model DiT-XL/2 --features-path DIR

Everything else is as in train.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from medart_core.errors import exit_codes
from train import main

if __name__ == "__main__":
    with exit_codes():
        sys.exit(main("features", __doc__))
