"""What is made from the parser and the documentation when a package is built."""
