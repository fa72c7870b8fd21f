"""A run's folder: file names, records, data, changed values, incidents, lease."""
