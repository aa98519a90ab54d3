"""The web demo: draw from words or classes, describe an image, look at a run; in a browser on your machine.

    python app.py                                     then open http://127.0.0.1:7860
    python app.py --root results --port 8000          runs and reports from another folder
    python app.py --model PixArt-alpha/PixArt-XL-2-512x512 --root /data/runs
    python app.py --share                             a public link, through Gradio's servers

The page reads what lies below --root, and no other file. Models load while the page opens; one picture is drawn at a
time, others wait. It needs requirements-app.txt; as a Hugging Face Space see docs/space/README.md. Not for diagnosis.
"""

import argparse
import functools
import html
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent
# In a Space the requirements are installed before our files are there, so the two local packages cannot be among them.
sys.path += [str(ROOT / "diffusers"), str(ROOT / "LLaVA-NeXT")]

from medart_core.errors import UserError, exit_codes  # noqa: E402

if TYPE_CHECKING:
    from medart_core.app_drawing import Studio
