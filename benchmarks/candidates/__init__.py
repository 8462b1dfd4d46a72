"""Bad candidates against gate, load checks and live watch; good ones must not be refused."""
