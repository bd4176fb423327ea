"""`python -m fennflow`: the program `fennflow`."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        # The first entry is the working directory, which may hold files that other people named.
        del sys.path[0]
    from fennflow.cli import main

    main()
