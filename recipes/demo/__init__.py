"""The built-in model `demo`: package data, and the scripts that made it."""
