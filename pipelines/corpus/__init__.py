"""Raw text to documents worth training on: finding, reading, mending, judging, masking, and telling what is double."""
