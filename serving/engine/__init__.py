"""The decoding loop: requests in, tokens out."""
