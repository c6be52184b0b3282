"""The bench behind scripts/bench: fusedisk against qemu-storage-daemon's FUSE export."""
