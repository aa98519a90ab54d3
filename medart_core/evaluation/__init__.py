"""Is a generated set of images any good: features, distances, colour, utility and privacy, each with its uncertainty."""
