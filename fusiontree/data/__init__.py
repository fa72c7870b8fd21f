"""Packed token shards: format, training order and batches. This package uses NumPy and never torch."""
