"""All knowledge of DeepSpeed's internals: the engine's setup, optimizer partitions in memory and on disk.

`internals.py` lists every undocumented attribute that this package uses; nothing outside it uses any of them.
"""
