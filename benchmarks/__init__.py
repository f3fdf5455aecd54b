"""What README's numbers were made with: `make bench`."""
