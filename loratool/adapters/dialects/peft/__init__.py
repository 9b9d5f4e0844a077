"""PEFT: adapter_config.json beside adapter_model.safetensors."""
