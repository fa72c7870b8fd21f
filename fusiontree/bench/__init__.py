"""Measurements: training and its peers, decoding and kernels on made-up tokens, the loader on a dataset.

They run the code that users run.
"""
