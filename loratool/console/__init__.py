"""Everything that prints: `common` for all verbs, and one module for each verb's report."""
