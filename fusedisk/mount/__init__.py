"""The FUSE face: the only package that imports pyfuse3, and only in the modules that a daemon loads."""
