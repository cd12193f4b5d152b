"""Where exports keep weights and manifests."""
