"""The one exception tree: every error mmpeft raises on purpose is an `MMPeftError`.

A message says what was found, what was expected and what to do about it.
"""


class MMPeftError(Exception):
    """Base of every error that mmpeft raises on purpose; the command line prints it without a traceback."""


class RecipeError(MMPeftError):
    """A recipe, option or training plan that cannot be meant as it stands (exit status 2)."""


class DataError(MMPeftError):
    """A data file, sample or picture that cannot be used; names the file, the sample and the reason."""


class ModelError(MMPeftError):
    """A model that cannot be loaded, composed or understood."""


class AdapterError(MMPeftError):
    """An adapter that does not fit its base, or a directory that holds no whole adapter."""


class OutputError(MMPeftError):
    """A place that cannot be written (read-only, full, or taken by something else), or what was written is damaged."""


class HubError(MMPeftError):
    """The Hub refuses or cannot be reached, or something must not be published; names the file and what to do."""


class MissingDependencyError(MMPeftError):
    """An optional library that is not installed; says what to install."""


class RunInterrupted(MMPeftError):
    """Work was stopped by Ctrl-C; says what is kept and how to go on."""


class MemoryLackError(MMPeftError):
    """A device's memory that does not suffice, whatever was done that changes no result; says what would help."""


class RunAgain(MMPeftError):
    """Memory did not suffice; the same command goes on with what was written down to need less of it."""

    STATUS = 75
    """Exit status of a process that it ends (sysexits.h, EX_TEMPFAIL): `mmpeft run` starts its processes again."""
