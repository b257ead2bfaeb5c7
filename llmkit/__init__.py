"""llmkit: fine-tune and distil language models from a recipe."""
