"""The task definitions: one folder per benchmark."""
