"""Trained networks outside PyTorch: exporting them, and running them with NumPy and a runtime alone."""
