"""How a model is placed on devices and stepped."""
