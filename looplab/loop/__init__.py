"""Steps, traced and run: from one step on one replica to a whole `fit`."""
