"""The command line."""

import sys
from collections.abc import Sequence


def launch(kind: str, argv: Sequence[str] | None = None) -> None:
    """Entry of `python -m stages.<kind> CONFIG ...`, the same as `prefloop <kind> CONFIG ...`."""
    sys.exit(main([kind, *(sys.argv[1:] if argv is None else argv)]))


def main(argv: Sequence[str] | None = None) -> int:
    raise NotImplementedError
