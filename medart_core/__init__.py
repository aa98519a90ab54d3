"""What the scripts share: one noun per module."""

import logging
import warnings

# PEFT imports bitsandbytes, which warns at once of a 4-bit CPU kernel that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# transformers 5.23 renamed what 5.17 knows under this name only.
warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing", FutureWarning)
