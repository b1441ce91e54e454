"""Tests that cross the borders of the packages."""
