"""Commands of the repository that are no part of a package."""
