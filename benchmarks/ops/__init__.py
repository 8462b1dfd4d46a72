"""One file a kernel of ``specops``: what it costs beside its floor and beside the best others."""
