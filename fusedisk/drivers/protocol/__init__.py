"""Drivers that reach bytes outside the process: host files, block devices, null-co."""
