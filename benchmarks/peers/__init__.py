"""What users would run instead, each with its own best settings. `make bench-setup` installs them."""
