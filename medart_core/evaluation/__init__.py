"""Is a generated set any good: features, distances, colour, utility and privacy, each with its uncertainty."""
