"""Changes of the settings of an open image."""
