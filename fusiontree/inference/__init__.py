"""Exported models: loading, generation, sampling, decoding speed."""
