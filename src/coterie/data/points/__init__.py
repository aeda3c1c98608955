"""Point clouds: packaged models, folders of one's own."""
