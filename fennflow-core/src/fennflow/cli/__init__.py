"""The program `fennflow`: what is installed, what a configuration guarantees, maintenance, files.

Install it with `pip install 'fennflow[cli]>=1.0'`. Exit codes, for scripts:

| code | meaning |
| --- | --- |
| 0 | done |
| 1 | failed; the reason is on standard error |
| 2 | usage error |
| 3 | done, and something needs attention: a plugin is broken, a transaction could not be finished, catalog and bucket differ, a promise does not hold |
| 130 | interrupted; uncommitted work is undone |
"""

from __future__ import annotations

import sys
from functools import cache


def main() -> None:
    """Run the program that `pip` installs as `fennflow`."""
    try:
        from fennflow.cli import app
    except ModuleNotFoundError as error:
        if error.name not in {"rich", "typer"}:
            raise
        sys.exit("The command line is not installed: pip install 'fennflow[cli]>=1.0'")
    _register_commands()
    sys.exit(app.main())


@cache
def _register_commands() -> None:
    from fennflow.cli import app, demo, files, maintenance, template, transfer

    for module in (maintenance, files, transfer, demo, template):
        module.register(app.app)
