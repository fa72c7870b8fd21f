"""A run's folder: file names, records, data, incidents, lease."""
