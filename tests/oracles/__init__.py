"""Our code held to numbers computed by the official implementations."""
