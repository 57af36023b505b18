"""What a model knows of held-out text (`language`) and what it recalls from its context (`retrieval`)."""
