"""python -m attn_compiler COMMAND: the same as the script attn-compiler."""

from __future__ import annotations

import sys

from attn_compiler.cli import main

if __name__ == "__main__":
    sys.exit(main())
