"""The comparison as a page and as figures."""
