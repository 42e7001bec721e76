"""The one exception for what the user can mend; everything else is a bug and keeps its traceback."""


class UserError(Exception):
    """Message = what is wrong, where (file, key or layer), what to do. `run.py` prints it as one line."""


class NotRunHere(UserError):
    """Another library's refusal, in its own words: a row of a table stays "not run", the other rows go on."""
