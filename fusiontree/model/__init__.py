"""The hybrid language model. It imports torch and its own files only.

The folder is flat because export copies it beside the weights, and Hugging Face's ``trust_remote_code`` loads modules
from one flat folder only.
"""
