"""A recipe, its stages and its run folder."""
