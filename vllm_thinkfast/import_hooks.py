"""Run something right after a module is imported: now, if that has happened, or when it happens.

Registration changes modules of vLLM that not every process needs and that take seconds to import.
vLLM registers its plugins in every process, so it must not be the plugin that imports them.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

Action = Callable[[], None]


class _Finder(importlib.abc.MetaPathFinder):
    """Leaves the finding to the others; adds the actions behind the module's own code."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Action]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """See ``MetaPathFinder``."""
        if fullname not in self.waiting:
            return None
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                self._extend(spec.loader, fullname)
                return spec
        return None

    def _extend(self, loader: Any, fullname: str) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            # Taken out first: an action may import further modules, or call when_imported.
            for action in self.waiting.pop(fullname, []):
                action()

        loader.exec_module = exec_module


_finder = _Finder()


def when_imported(name: str, action: Action) -> None:
    """Calls ``action`` once the module ``name`` is there; never imports it.

    An exception of the action is an exception of the import.

    Args:
        name: of a module, in full.
        action: without arguments; called at once if the module has been imported.
    """
    if name in sys.modules:
        action()
        return
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    _finder.waiting.setdefault(name, []).append(action)
