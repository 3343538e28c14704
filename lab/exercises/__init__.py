"""The exercises in docs/exercises: what their pages say is typed, and what then must be shown."""
