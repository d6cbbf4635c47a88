"""What `pagellm tune` is made of: a plan that fits the minutes, and trials scored on validation."""
