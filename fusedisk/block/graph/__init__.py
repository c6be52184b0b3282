"""The graph: names, the gate, opening, permissions along the edges, draining and changing it, and its users."""
