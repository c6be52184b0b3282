"""The commands. :mod:`fusedisk.cli.main` finds them; each module exposes one click command named ``command``."""
