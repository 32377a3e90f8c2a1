"""Model, loss, parameters and data as one function: the empirical risk."""
