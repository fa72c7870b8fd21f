"""Pretraining of hybrid language models: Mamba-2 and attention branches fused by a learned gate."""

__version__ = "0.1.0"
