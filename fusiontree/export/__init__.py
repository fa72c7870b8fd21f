"""Export to Hugging Face folders, proven equal to the trained model."""
