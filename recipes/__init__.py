"""One script a stage; importable so that tests call what people call."""
