"""The run itself: models, batches, the loop."""
