"""What every stage is made of: command line, run directory, processes, optimiser. Knows no shop."""
