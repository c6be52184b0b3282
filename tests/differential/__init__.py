"""Long random runs against a flat oracle and against QEMU, see ``test_random_runs.py``."""
