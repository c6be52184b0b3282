"""Tests of fusedisk. Helpers shared by all of them live in tests/conftest.py."""
