"""Put an exported model back into a pipeline: files of a folder, position tables, sessions, the transformer."""
