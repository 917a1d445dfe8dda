"""What a run saves, when, and how it is restored."""
