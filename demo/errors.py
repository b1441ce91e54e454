"""The one error of demo/ and scripts/ for what the user can mend."""


class InputError(Exception):
    """One line that names the value, what is accepted, and the fix. Ends with exit code 2."""
