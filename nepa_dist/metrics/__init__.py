"""What a run measures, where the numbers go, and how they are named."""
