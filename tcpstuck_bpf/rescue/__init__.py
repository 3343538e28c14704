"""Who gets a SYN-ACK once more, and how it is sent."""
