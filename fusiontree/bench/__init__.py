"""Measurements: training and its peers, decoding and kernels on made-up tokens, the loader on a dataset.

An export's needs are measured on drawn weights. All run the code that users run.
"""
