"""What ends a run, what it leaves behind, and who hears of it."""
