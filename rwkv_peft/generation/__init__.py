"""Using a model: sampling, generation with carried state, dialogue."""
