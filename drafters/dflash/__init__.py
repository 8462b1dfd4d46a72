"""DFlash: a block of tokens drafted in one pass, over keys and values of the target's layers."""
