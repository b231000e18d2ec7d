"""One inherited suite per contract: supply an object and its dense twin, inherit every test."""
