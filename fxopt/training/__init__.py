"""What `fxopt.finetune` is made of."""
