"""Tests of the student models."""
