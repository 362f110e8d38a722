"""The embedded default: a small base model, a task the package writes itself, and the whole path over both."""
