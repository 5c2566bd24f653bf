"""What others may see and do: encrypted connections, least privilege, secrets, hostile names."""
