"""What things cost: time and memory of every stage, beside peers."""
