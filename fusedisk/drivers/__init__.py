"""Protocol, format and filter drivers, and the one table that lists them (:mod:`fusedisk.drivers.table`)."""
