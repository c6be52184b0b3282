"""What a graph is made of: nodes, edges, drivers, extents, permissions and limits. Knows no request and no graph."""
