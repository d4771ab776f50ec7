"""Entry point of `shunted-lit`: print the help or run one command, and report errors in one line.

The commands are listed in `shunted_lit.commands`. Everything heavy is imported by the command that needs it.
"""

import logging
import sys
from collections.abc import Sequence
from typing import Any

from shunted_lit.commands import find_command, format_help


def main(args: Sequence[str] | None = None) -> Any:
    """Run a command line.

    Args:
        args: words after `shunted-lit`; those of the process by default.

    Returns:
        The result of the command; a `LightningCLI` for fit, validate, test and predict.

    Raises:
        ValueError: an input is invalid.
        SystemExit: the words cannot be parsed, or help was requested.
    """
    args = sys.argv[1:] if args is None else list(args)
    if args[:1] == ["help"]:
        args = [*args[1:2], "--help"]
    if not args or args[0] in ("-h", "--help"):
        print(format_help())
        return None
    if args[0].startswith("-"):  # `shunted-lit --config FILE fit`, where FILE has a section for each command
        from shunted_lit.commands.fit import run_trainer

        return run_trainer(args)
    return find_command(args[0]).run(args[1:])


class StderrHandler(logging.Handler):
    """Write messages to the current `sys.stderr`: a progress bar replaces it, so that they appear above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def command() -> None:
    """Run the console script: an error that users can correct is one line on stderr and exit code 2."""
    from shunted_lit.commands.errors import describe_error, process_rank, program_name

    name, rank = program_name(), process_rank()
    logging.basicConfig(format=f"{name}: %(message)s" if rank else "%(message)s", handlers=[StderrHandler()])
    level = logging.WARNING if rank else logging.INFO  # rank 0 reports what all ranks have in common
    logging.getLogger("shunted_lit").setLevel(level)
    logging.getLogger("timm.models._builder").setLevel(level)  # reports which pretrained weights were used
    try:
        main()
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        message = describe_error(error)
        if message is None:
            raise
        print(f"{name}: error: {message}", file=sys.stderr)
        sys.exit(2)
