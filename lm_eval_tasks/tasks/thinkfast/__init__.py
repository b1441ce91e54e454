"""The group that runs the paper's set."""
