"""The hybrid language model. Its files import torch, Triton (`triton_*.py`), transformers (`hf.py`) and each other.

Export copies this folder next to the weights. It is flat because Hugging Face's ``trust_remote_code`` loads modules
from one flat folder only.
"""
