"""What can be set: one typed schema, its loader, and the YAML files people start from."""
