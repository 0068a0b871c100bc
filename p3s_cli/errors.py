"""Everything p3s raises on purpose. The command line turns these into one sentence and an exit code."""


class P3SError(Exception):
    """One sentence for the user: what, where, what to do."""

    exit_code = 1


class InputError(P3SError):
    """The user's input is at fault: a bad path, point, prompt, name or artifact."""

    exit_code = 2


def first_reason(error: Exception) -> str:
    """The first thing that pydantic found, in one line; of another error, what it says."""
    if not hasattr(error, "errors"):  # pydantic's, told without importing it: `p3s --help` comes by here
        return str(error)
    first = error.errors()[0]
    return ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
