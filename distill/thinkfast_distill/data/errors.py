"""The one error for data that cannot be used."""


class DataError(ValueError):
    """A data file, source or option is wrong; one line with place, accepted values and fix."""
