"""What happens about every RPC, one concern a file."""
