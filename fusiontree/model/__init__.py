"""The hybrid language model: a closed, flat island that imports torch and its own files only.

Export copies these files beside the weights, so that the exported folder needs nothing of this project.
"""
