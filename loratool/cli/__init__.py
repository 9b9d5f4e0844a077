"""What is typed: parse, call a verb, render."""
