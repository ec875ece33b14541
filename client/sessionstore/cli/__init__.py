"""sessionctl: look at sessions, write to them, and carry them in and out, from a shell.

`main` is what the command calls. It loads nothing before it knows that the extra `cli` is installed, because
the command exists without it, too. It must not know of files, of the terminal or of the daemon.
"""

import sys

_EXTRA = frozenset({"click", "rich"})


def main() -> None:
    """Run sessionctl with the arguments of this process, and exit."""
    try:
        from sessionstore.cli.app import sessionctl
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        print(
            f"sessionctl needs {error.name}, which is not installed: pip install 'sessionstore[cli]'",
            file=sys.stderr,
        )
        sys.exit(1)
    sessionctl()
