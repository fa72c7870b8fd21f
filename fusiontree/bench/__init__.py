"""Measurements: training and its peers, decoding, kernels. They run the code that users run, on made-up tokens."""
