"""Rules that decide which of the traces held are in the next batch."""
