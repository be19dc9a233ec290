"""A config written down for another trainer: TRL's GRPOTrainer, or verl."""
