"""FusionTree: pretraining of hybrid language models, a Mamba and an attention branch fused by a learned gate."""

__version__ = "0.1.0"
