"""The commands: where Hydra meets Lightning."""
