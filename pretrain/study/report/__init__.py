"""Report of a study: tables and figures from its tidy table, as one page without a network."""
