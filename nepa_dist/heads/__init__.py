"""Heads that sit on the backbone."""
