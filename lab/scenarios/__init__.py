"""The lab's scenarios, and the tracer that runs with them."""
