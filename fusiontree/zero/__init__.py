"""All knowledge of DeepSpeed's internals: its optimizer state in memory and on disk."""
