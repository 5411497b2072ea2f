"""``python -m khosim`` is the ``khosim`` command."""

from __future__ import annotations

import sys

from khosim.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
