"""The demo and its traffic; small scripts a newcomer reads first."""
