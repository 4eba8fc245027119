"""Ray Serve: the OpenAI-compatible service over the generation engine."""
