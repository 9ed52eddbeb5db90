"""fedloop: federated LoRA fine-tuning whose server knows how far to trust each client."""
