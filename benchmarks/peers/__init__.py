"""What Stepcast is compared with: echoes that do nothing, and services as one would write them by hand."""
