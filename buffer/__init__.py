"""What stands between server and trainer: traces go one way, weights the other. No torch here."""
