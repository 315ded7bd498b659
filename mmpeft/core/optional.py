"""Optional libraries enter through `require`, whose error names what to install."""

import importlib
from types import ModuleType

from mmpeft.core.errors import MissingDependencyError


def require(module: str, *, extra: str = "", package: str = "") -> ModuleType:
    """Import `module`, or say what brings it.

    Args:
        module: its name.
        extra: the extra of mmpeft that brings it.
        package: where no extra does, what pip is to be given.

    Raises:
        MissingDependencyError: `module` is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        wanted = package or f"'mmpeft[{extra}]'"
        raise MissingDependencyError(
            f"{module} is not installed (import of {error.name} failed); run: pip install {wanted}"
        ) from error
