"""Packed token shards: their format, the order of training, and the batches; numpy only, never torch."""
