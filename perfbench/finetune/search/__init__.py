"""FanLoRA's search: which LoRA modules each layer keeps, and why."""
