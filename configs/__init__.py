"""Settings: a typed schema, its loader, and shipped YAML files."""
