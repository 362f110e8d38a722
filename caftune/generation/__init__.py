"""A model answers prompts: backends, servers, cached answers."""
