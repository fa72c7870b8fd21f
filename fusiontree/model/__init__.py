"""The hybrid language model. It imports torch and its own files only.

Export copies this folder next to the weights. It is flat because Hugging Face's ``trust_remote_code`` loads modules
from one flat folder only.
"""
