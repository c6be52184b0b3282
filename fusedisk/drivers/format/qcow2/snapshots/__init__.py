"""Internal snapshots, and the VM state that lies in them."""
