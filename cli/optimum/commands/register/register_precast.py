"""`optimum-cli export precast …`: the command `precast export`, with the same arguments.

optimum's command line imports every module of this namespace and reads its REGISTER_COMMANDS.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

__all__ = ["REGISTER_COMMANDS"]


class PrecastExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    """Hands all that stands behind `optimum-cli export precast` to `precast export`."""

    COMMAND = CommandInfo(name="precast", help="Compile a checkpoint with static shapes, as `precast export` does.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Take every word as it is: `precast export` knows its options, and its help, itself."""

        def take_all(words: Sequence[str], namespace: Namespace | None = None) -> tuple[Namespace, list[str]]:
            found = namespace or Namespace()
            found.words, found.func = list(words), parser.get_default("func")
            return found, []

        taking: Any = parser
        taking.parse_known_args = take_all

    def run(self) -> None:
        """Run `precast export`, which ends the process with its exit code."""
        from precast.cli import main

        sys.argv = ["precast", "export", *self.args.words]
        main()


REGISTER_COMMANDS = [(PrecastExportCommand, ExportCommand)]
