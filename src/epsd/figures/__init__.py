"""What is drawn, in one style."""
