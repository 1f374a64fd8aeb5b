"""The built-in model `demo`: package data, and the script that made it."""
