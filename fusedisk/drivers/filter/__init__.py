"""Drivers that sit between a parent and one child and change how requests run."""
