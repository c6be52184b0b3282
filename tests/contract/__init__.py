"""What every driver promises, checked on every driver of the table."""
