"""Operations of speculative decoding, each with its torch definition."""
