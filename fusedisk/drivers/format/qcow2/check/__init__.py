"""Checking and repairing images that are not open."""
