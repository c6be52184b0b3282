"""The engine: nodes, edges, permissions, the request path. Owns the driver interface and knows no driver."""
