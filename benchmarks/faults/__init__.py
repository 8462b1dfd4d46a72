"""Faults of the buffer by the thousand: damage, hostile records, kills, bad networks."""
