"""Pictures: packaged sets, folders of one's own, latents."""
