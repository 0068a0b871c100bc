"""Everything p3s raises on purpose. The command line turns these into one sentence and an exit code."""


class P3SError(Exception):
    """One sentence for the user: what, where, what to do."""

    exit_code = 1


class InputError(P3SError):
    """The user's input is at fault: a bad path, point, prompt, name or artifact."""

    exit_code = 2
