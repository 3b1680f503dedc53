"""Fine-tuning of every method, the papers' tasks, FanLoRA's search, and the verdict on accuracy as served."""
