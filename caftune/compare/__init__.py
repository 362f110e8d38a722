"""Did it help? Arms, seeds, intervals, verdict."""
