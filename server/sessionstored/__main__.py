"""The command `sessionstored`, also as `python -m sessionstored`.

The command is installed without the extra `server`, too; then it says what to install.
"""

import sys

_EXTRA = frozenset({"apsw", "click", "grpc_health", "grpc_reflection", "platformdirs", "rich"})


def main() -> None:
    """Run sessionstored with the arguments of this process, and exit."""
    try:
        from sessionstored.cli import main as command
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        print(
            f"sessionstored needs {error.name}, which is not installed: pip install 'sessionstore[server]'",
            file=sys.stderr,
        )
        sys.exit(1)
    command()


if __name__ == "__main__":
    main()
