"""Drivers and helpers that tests share."""
