"""The way of a request through a node: the door, the transfer below it, and the short ways past both."""
