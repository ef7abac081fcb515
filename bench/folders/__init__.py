"""Folders that other tools made, opened: which are exact, and how fast they are."""
