"""What a merge measured, as JSON, a table, pictures; and what it cost."""
