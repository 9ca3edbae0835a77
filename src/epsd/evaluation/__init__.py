"""What a trained network is worth and costs, and the forms in which it is kept."""
