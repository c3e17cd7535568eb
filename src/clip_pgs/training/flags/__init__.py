"""The flags of the training command, and the YAML files of them."""
