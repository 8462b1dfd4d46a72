"""What served requests leave for the trainer."""
