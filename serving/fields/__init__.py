"""What a sampling field is (``definition``), and the definitions that need more than one line.

``serving.sampling.SamplingParams`` is the table that lists every field.
"""
