"""Studies that compare many runs. They use what pagellm's modules export; nothing imports them."""
