"""How a policy's plan runs: the key and value storage, attention in place of stock, the state."""
