"""Optional libraries enter through `require`, whose error names the extra to install."""

import importlib
from types import ModuleType

from mmpeft.core.errors import MissingDependencyError


def require(module: str, *, extra: str) -> ModuleType:
    """Import `module`, or say which extra of mmpeft brings it.

    Raises:
        MissingDependencyError: `module` is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"{module} is not installed (import of {error.name} failed); run: pip install 'mmpeft[{extra}]'"
        ) from error
