"""Many rows: files in, files out, on one machine or a cluster."""
