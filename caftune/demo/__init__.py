"""The embedded default: a small base model, a generated task, and the whole path with both."""
