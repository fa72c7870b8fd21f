"""Benchmarks of training, peer models, decoding, kernels, the data loader, export and the engine's overhead.

Each benchmark runs the code that users run, on synthetic tokens and random weights; the data loader reads a dataset.
"""
