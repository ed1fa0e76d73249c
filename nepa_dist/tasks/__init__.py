"""What is trained: each task is a module whose forward takes a batch and returns the loss."""
