"""Run code once another package has been imported, without importing it."""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


class ImportAfter(MetaPathFinder):
    """Import the module `follower` right after `package` has been imported.

    Args:
        package: top-level name.
        follower: full name of the module that builds on it.
    """

    def __init__(self, package: str, follower: str):
        self.package, self.follower = package, follower

    def install(self) -> None:
        """Import `follower` now if `package` has been imported already, else when it is."""
        if self.package in sys.modules:
            importlib.import_module(self.follower)
        else:
            sys.meta_path.insert(0, self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.package:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_both(module: ModuleType) -> None:
                execute(module)
                importlib.import_module(self.follower)

            spec.loader.exec_module = execute_both  # type: ignore[method-assign]
        return spec
