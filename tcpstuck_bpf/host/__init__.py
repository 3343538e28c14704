"""What the machine says beside the programs: namespaces, firewall rules, sockets, the log."""
