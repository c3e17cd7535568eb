"""Studies: arms times seeds, trained and evaluated by one command, with paired statistics."""
