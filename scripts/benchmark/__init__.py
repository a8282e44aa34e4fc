"""Benchmarks of inference, training, data and kernels, and the reference they are held against."""
