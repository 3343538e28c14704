"""Facts from the machine itself: namespaces, firewall rules, sockets, symbols, the kernel log."""
