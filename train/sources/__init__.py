"""Where training data comes from: recorded calls, prompts that the teacher draws, pictures with captions."""
