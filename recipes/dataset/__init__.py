"""Text to train on: a slice of FineWeb, or of any data set in its schema, as parquet files with an exact number of tokens."""
