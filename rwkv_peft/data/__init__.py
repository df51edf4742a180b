"""From files of texts and dialogues to batches of token ids."""
