"""The HTTP service: requests become rows of one batch (extra `serve`)."""
