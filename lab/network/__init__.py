"""Network namespaces joined by a veth pair, and the packets between them."""
