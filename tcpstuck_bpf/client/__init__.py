"""The client's side: connections of this host on which no byte has gone either way."""
