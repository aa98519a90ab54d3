"""What the scripts share: one noun per module."""

import logging

# PEFT imports bitsandbytes, which warns at once of a 4-bit CPU kernel that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
