"""A top-level node as a flat file, free of FUSE: what the mount's faces share."""
