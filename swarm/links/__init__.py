"""What the transport is made of: frames, TLS, connections; and the same in memory, in virtual time."""
