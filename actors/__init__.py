"""What stays up in a cluster: expert feature servers and answer servers."""
