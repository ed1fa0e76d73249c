"""Saving and finding the state of a run."""
